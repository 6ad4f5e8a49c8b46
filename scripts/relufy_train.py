"""Training for `relufy.py`: the dense model's own predictions are learnt while ever fewer neurons may fire.

The loss is the KL divergence from the dense model's next-token distribution. A penalty on a smooth count of firing
neurons goes with it, whose weight is what a controller makes it: the firing share is asked for, not a weight.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from relufy_net import Base, Difference, Network, Weights
from torch import Tensor

from profiler.common.artifact import atomic_write
from profiler.common.errors import HybridError, InputError

Tell = Callable[[str], None]
# Logits are made for so many tokens at a time: 8,192 of 49,152 words are 0.8 GB in bf16.
_CHUNK_TOKENS = 8192
_READ_EVERY = 10  # steps: reading waits for the GPU
_TELL_SECONDS = 10.0
# Of the memory that is free, what the dense model's hidden states may take.
_CACHE_SHARE = 0.5


@dataclass(frozen=True)
class Settings:
    """How to train: `batch` windows of `context` tokens a step, until `minutes` or `steps` are over.

    firing: share of neurons that fire at the end. descent: by which share of the time it is reached. blend: share of
    the time in which the dense activation fades out. cooldown: share of the time, at the end, in which steps shrink to
    nothing. label_weight: of the text's own next token beside the dense model's distribution. Raises `InputError` on a
    bad value.
    """

    firing: float = 0.15
    minutes: float = 8.0
    steps: int | None = None
    batch: int = 24
    context: int = 1024
    rate: float = 1e-3
    descent: float = 0.5
    blend: float = 0.1
    cooldown: float = 0.6
    label_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("minutes", "batch", "context", "rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps is {self.steps}, expected 1 or more")
        if not 0 < self.firing <= 0.5:
            raise InputError(f"firing is {self.firing:.3g}, expected a share above 0% and up to 50%")
        for name in ("descent", "blend", "cooldown", "label_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 to 1")

    def rate_at(self, progress: float) -> float:
        """Length of a step: up over the first 2% of the time, level, then down to nothing."""
        down = (1 - progress) / self.cooldown if self.cooldown else 1.0
        return self.rate * min(1.0, progress / 0.02 + 1e-3, max(0.0, down))

    def blend_at(self, progress: float) -> float:
        """Share of the dense activation that is left."""
        return max(0.0, 1 - progress / self.blend) if self.blend else 0.0

    def firing_at(self, progress: float, first: float) -> float:
        """Share to aim at: from `first`, where it began, to the last one, by equal factors."""
        done = min(1.0, progress / self.descent) if self.descent else 1.0
        return self.firing * max(1.0, first / self.firing) ** (1 - done)


@dataclass
class Controller:
    """Weight of the firing penalty: an integral of the relative error and a part that follows it at once, in logs.

    The integral runs over progress, not steps, so that short runs and long ones come down alike.
    """

    weight: float = 0.05

    def update(self, firing: float, wanted: float, moved: float) -> float:
        """The weight to use now. moved: progress since the last call."""
        error = max(-1.0, min(1.0, math.log(max(firing, 1e-6) / wanted)))
        self.weight = min(20.0, max(1e-3, self.weight * math.exp(min(0.5, 40 * moved) * error)))
        return self.weight * math.exp(2 * error)


@dataclass
class State:
    """Where a training is, apart from what is learnt."""

    step: int = 0
    seconds: float = 0.0
    penalty: float = 0.0
    integral: float = Controller.weight
    first_firing: float | None = None
    rows: list[dict[str, float]] = field(default_factory=list)


def _divergence(sparse: Tensor, dense: Tensor, labels: Tensor, label_weight: float) -> tuple[Tensor, Tensor]:
    """KL from dense to sparse logits [n, vocab], nats, summed; and the loss's gradient by the sparse ones.

    labels [n]: the text's next tokens, -1 where there is none.
    """
    log_sparse, log_dense = (F.log_softmax(logits.float(), -1) for logits in (sparse, dense))
    wanted = log_dense.exp()
    kl = (wanted * (log_dense - log_sparse)).sum()
    if label_weight:
        weight = label_weight * (labels >= 0).float()[:, None]
        words = torch.arange(sparse.shape[1], device=sparse.device)
        wanted = (1 - weight) * wanted + weight * (words == labels[:, None])
    return kl, (log_sparse.exp() - wanted).to(sparse.dtype)


class Distillation:
    """Loss and its gradient by hidden states, a part of the tokens at a time, so that few logits exist at once."""

    def __init__(self, head: Tensor, label_weight: float, compiled: bool) -> None:
        self._head, self._label_weight = head, label_weight
        self._divergence = torch.compile(_divergence) if compiled else _divergence

    @torch.no_grad()
    def __call__(self, sparse: Tensor, dense: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, d] of ids [B, T] -> mean KL per token, and the mean loss's gradient by `sparse`."""
        rows, total = max(1, _CHUNK_TOKENS // ids.shape[1]), torch.zeros((), device=ids.device)
        gradients = []
        labels = F.pad(ids[:, 1:], (0, 1), value=-1)
        for part in zip(sparse.split(rows), dense.split(rows), labels.split(rows), strict=True):
            s, d, label = (tensor.flatten(0, 1) for tensor in part)
            kl, by_logits = self._divergence(
                F.linear(s, self._head), F.linear(d, self._head), label, self._label_weight
            )
            total += kl
            gradients.append((by_logits @ self._head / ids.numel()).view_as(part[0]))
        return total / ids.numel(), torch.cat(gradients)


def _free_memory(device: torch.device) -> int:
    """Bytes; 0 on a CPU, where memory is not ours to fill."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


class Teacher:
    """The dense model's hidden states for windows of the corpus, kept where memory allows: then each window costs its
    pass through the dense model once, however often it is trained on."""

    def __init__(self, base: Base, network: Network, windows: Tensor) -> None:
        self._base, self._network, self._windows = base, network, windows
        device, shape = base.embedding.device, (*windows.shape, base.spec.d_model)
        needed = math.prod(shape) * base.embedding.element_size()
        fits = needed < _CACHE_SHARE * _free_memory(device)
        self._kept = torch.empty(shape, dtype=base.embedding.dtype, device=device) if fits else None
        self._known = np.zeros(len(windows), bool)

    @torch.no_grad()
    def __call__(self, numbers: Tensor, ids: Tensor) -> Tensor:
        """Hidden states [B, T, d] of windows of these numbers (on the CPU), whose ids [B, T] lie on the device."""
        if self._kept is None:
            return self._network(ids, self._base, None)[0]
        where = numbers.tolist()
        if not self._known[where].all():
            for number, states in zip(where, self._network(ids, self._base, None)[0], strict=True):
                self._kept[number] = states
            self._known[where] = True
        return torch.stack([self._kept[number] for number in where])


class Training:
    """Trains a difference in place; `save` is called every `save_minutes` and when it is interrupted."""

    def __init__(self, base: Base, difference: Difference, windows: Tensor, settings: Settings, compiled: bool) -> None:
        """windows [n, context] int32, on the CPU. Raises `InputError` where they are too few."""
        if len(windows) < 1:
            raise InputError(f"the corpus gives no window of {settings.context} tokens; add text or lower --context")
        self.state, self._settings = State(), settings
        self._batch = min(settings.batch, len(windows))
        # A whole number of batches, so that each round meets each window once.
        self._windows = windows[: len(windows) // self._batch * self._batch].to(base.embedding.device)
        self._difference, self._device = difference, base.embedding.device
        self._network = Network(base, settings.context, compiled)
        self._teacher = Teacher(base, self._network, self._windows)
        self._distil = Distillation(base.head, settings.label_weight, compiled)
        on_gpu = self._device.type == "cuda"
        parameters = list(difference.parameters())
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu)
        self._blend = torch.zeros((), device=self._device)
        self._round, self._order = -1, torch.empty(0)

    @property
    def tokens(self) -> int:
        """Tokens trained on, counted as often as they were."""
        return self.state.step * self._batch * self._settings.context

    def run(self, tell: Tell, save: Callable[[], None], save_minutes: float = 2.0) -> None:
        """Train to the end. Raises `HybridError` where the loss is no longer a number."""
        state = self.state
        if self._progress() >= 1:
            return
        tell(f"step {state.step}: the first one compiles" if self._device.type == "cuda" else f"step {state.step}")
        float(self._gradients(self._progress())[0])  # what compiling takes is none of the time
        self.optimizer.zero_grad(set_to_none=True)
        begun = told = saved = time.monotonic()
        first, before = state.step, state.seconds
        try:
            while (progress := self._progress()) < 1:
                self._step(progress)
                state.step += 1
                now = time.monotonic()
                state.seconds = before + now - begun
                if now - told > _TELL_SECONDS:
                    tell(self._line((state.step - first) / (now - begun)))
                    told = now
                if now - saved > 60 * save_minutes:
                    save()
                    saved = now
        except KeyboardInterrupt:
            save()
            raise

    def _progress(self) -> float:
        settings, state = self._settings, self.state
        of_steps = state.step / settings.steps if settings.steps else 0.0
        return max(of_steps, state.seconds / (60 * settings.minutes))

    def _line(self, steps_per_second: float) -> str:
        row, settings = self.state.rows[-1], self._settings
        left = 60 * settings.minutes - self.state.seconds
        if settings.steps:
            left = min(left, (settings.steps - self.state.step) / steps_per_second)
        speed = steps_per_second * self._batch * settings.context
        return (
            f"step {self.state.step}, {self._progress():.0%}, {speed:,.0f} tokens/s, {left:.0f} s left: "
            f"KL {row['kl']:.4f}, firing {row['firing']:.1%} (wanted {row['wanted']:.1%}), penalty {row['penalty']:.3f}"
        )

    def _numbers(self) -> Tensor:
        """The windows of this step: every round has its own order, which the seed and its number give."""
        steps = len(self._windows) // self._batch
        at_round, at = divmod(self.state.step, steps)
        if at_round != self._round:
            draw = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + at_round)
            self._round, self._order = at_round, torch.randperm(len(self._windows), generator=draw)
        return self._order[at * self._batch : (at + 1) * self._batch]

    def _gradients(self, progress: float) -> tuple[Tensor, Tensor]:
        """Leave gradients of one step; the mean KL and the share that fired, f32 scalars on the device."""
        numbers = self._numbers()
        ids = self._windows[numbers.to(self._device)].long()
        dense = self._teacher(numbers, ids)
        self._blend.fill_(self._settings.blend_at(progress))
        sparse, soft, fired = self._network(ids, self._difference, self._blend)
        kl, by_hidden = self._distil(sparse, dense, ids)
        torch.autograd.backward([sparse, self.state.penalty * soft.mean()], [by_hidden, None])
        return kl, fired.mean()

    def _step(self, progress: float) -> None:
        kl, fired = self._gradients(progress)
        torch.nn.utils.clip_grad_norm_(self._difference.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = self._settings.rate_at(progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.state.step % _READ_EVERY == 0:
            self._read(float(kl), float(fired), progress)

    def _read(self, kl: float, firing: float, progress: float) -> None:
        state = self.state
        if not math.isfinite(kl):
            raise HybridError(f"the loss is {kl} at step {state.step}; try a lower --rate")
        if state.first_firing is None:
            state.first_firing = firing
        moved = progress - state.rows[-1]["progress"] if state.rows else 0.0
        wanted = self._settings.firing_at(progress, state.first_firing)
        controller = Controller(state.integral)
        state.penalty = controller.update(firing, wanted, moved)
        state.integral = controller.weight
        row = {"step": state.step, "progress": progress, "seconds": state.seconds, "kl": kl, "firing": firing}
        state.rows.append(row | {"wanted": wanted, "penalty": state.penalty})


def save_checkpoint(path: Path, training: Training, difference: Difference, origin: dict[str, Any]) -> None:
    """Write all that `load_checkpoint` needs, whole or not at all. origin: what it must be resumed with."""
    content = {
        "origin": origin,
        "state": asdict(training.state),
        "difference": difference.state_dict(),
        "optimizer": training.optimizer.state_dict(),
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path, training: Training, difference: Difference, origin: dict[str, Any]) -> None:
    """Go on where `path` was written. Raises `InputError` when it is damaged or of other settings."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["origin"]
        state = State(**content["state"])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}); delete it to begin anew") from error
    others = [name for name in origin if found.get(name) != origin[name]]
    if others:
        raise InputError(
            f"{path} is of a run with {others[0]} {found.get(others[0])}, this one has {origin[others[0]]}; "
            "give what it was begun with, or delete it to begin anew"
        )
    difference.load_state_dict(content["difference"])
    training.optimizer.load_state_dict(content["optimizer"])
    training.state = state


@dataclass(frozen=True)
class Report:
    """What a sparse model loses on held-out text: perplexities, KL (nats), agreement of the likeliest token."""

    tokens: int
    dense_perplexity: float
    perplexity: float
    kl: float
    top1: float
    firing: float
    firing_by_layer: list[float]

    @property
    def loss(self) -> float:
        """Of perplexity, relative."""
        return self.perplexity / self.dense_perplexity - 1

    def text(self) -> str:
        """Two lines for people."""
        layers = ", ".join(f"{100 * share:.0f}" for share in self.firing_by_layer)
        return (
            f"{self.tokens:,} held-out tokens: perplexity dense {self.dense_perplexity:.4f}, sparse "
            f"{self.perplexity:.4f} ({self.loss:+.2%}), KL {self.kl:.4f}, top-1 {self.top1:.2%}, firing "
            f"{self.firing:.2%}\nfiring by layer, %: {layers}"
        )


@torch.no_grad()
def measure(network: Network, base: Base, sparse: Weights, windows: Tensor, rows: int = 4) -> Report:
    """Both models on windows [n, T] int32, `rows` at a time."""
    device, blend = base.embedding.device, torch.zeros((), device=base.embedding.device)
    sums, fired = torch.zeros(4, dtype=torch.float64), torch.zeros(base.spec.n_layers, dtype=torch.float64)
    for part in windows.split(rows):
        ids = part.to(device).long()
        dense = network(ids, base, None)[0]
        hidden, _, shares = network(ids, sparse, blend)
        fired += shares.double().cpu() * len(part)
        for d, s, row in zip(dense, hidden, ids, strict=True):
            sums += _compared(F.linear(d[:-1], base.head).float(), F.linear(s[:-1], base.head).float(), row[1:])
    tokens = len(windows) * (windows.shape[1] - 1)
    dense_entropy, entropy, kl, top1 = (sums / tokens).tolist()
    by_layer = (fired / len(windows)).tolist()
    share = sum(by_layer) / len(by_layer)
    return Report(tokens, math.exp(dense_entropy), math.exp(entropy), kl, top1, share, by_layer)


def _compared(dense: Tensor, sparse: Tensor, labels: Tensor) -> Tensor:
    """Logits [n, vocab] f32 -> sums over n of both cross-entropies, KL and agreement, f64 [4]."""
    log_dense, log_sparse = F.log_softmax(dense, -1), F.log_softmax(sparse, -1)
    kl = (log_dense.exp() * (log_dense - log_sparse)).sum()
    entropies = [F.nll_loss(logs, labels, reduction="sum") for logs in (log_dense, log_sparse)]
    agreed = (dense.argmax(-1) == sparse.argmax(-1)).sum()
    return torch.stack([*entropies, kl, agreed.float()]).double().cpu()
