"""`ActivationRecorder`: counts of firings and sampled FFN inputs, taken by hooks while a model runs.

Memory is the counts, the bounded sample and one layer's activations at a time, whatever the corpus.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import nn

from profiler.common.artifact import ArtifactHeader, read_tensors, write_tensors
from profiler.common.errors import ArtifactError, CorpusError
from profiler.common.progress import Progress
from profiler.common.spec import ModelSpec
from profiler.corpus import TokenWindows
from profiler.profile import REPAIR, NeuronProfile

_PARTIAL_KIND = "partial neuron profile"
# Predictors of the embedded model overfit 16,384 samples and no longer 49,152 (LOG.md); a 7B model keeps 2,000 in this.
SAMPLE_TOKENS = 49_152
SAMPLE_BYTES = 512 << 20
_VALIDATION_WINDOWS = 16
_SAVE_SECONDS = 300.0  # what a killed run loses at most


@dataclass(frozen=True)
class ProfileSettings:
    """How much to record: `sample_tokens` inputs are kept, but no more than `sample_bytes` allow."""

    sample_tokens: int = SAMPLE_TOKENS
    sample_bytes: int = SAMPLE_BYTES
    seed: int = 0

    def samples(self, spec: ModelSpec, tokens: int) -> int:
        """How many tokens' inputs to keep out of `tokens`."""
        return max(1, min(self.sample_tokens, tokens, self.sample_bytes // (2 * spec.n_layers * spec.d_model)))


class ActivationRecorder:
    """Hooks one FFN module and one activation module per layer.

    An activation module may be called once per FFN call or on consecutive blocks of neurons; its output is counted
    where it is not 0, as [tokens, neurons].
    """

    def __init__(self, spec: ModelSpec, ffns: Sequence[nn.Module], activations: Sequence[nn.Module]) -> None:
        """Raises `ValueError` unless there is one of each per layer."""
        if not len(ffns) == len(activations) == spec.n_layers:
            raise ValueError(f"{spec.n_layers} layers, but {len(ffns)} FFN and {len(activations)} activation modules")
        self.spec, self._ffns, self._activations = spec, ffns, activations
        self.counts = np.zeros((spec.n_layers, spec.d_ff), np.int64)
        self.inputs: list[torch.Tensor] = [torch.empty(0)] * spec.n_layers
        self._position = [0] * spec.n_layers
        self._picked = torch.empty(0, dtype=torch.int64)

    @contextlib.contextmanager
    def recording(self) -> Iterator[ActivationRecorder]:
        """Hooks are in place inside this block, and gone after it whatever happens."""
        handles = []
        try:
            for layer, (ffn, activation) in enumerate(zip(self._ffns, self._activations, strict=True)):
                handles.append(ffn.register_forward_pre_hook(self._sample_hook(layer)))
                handles.append(activation.register_forward_hook(self._count_hook(layer)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def pick(self, positions: np.ndarray) -> None:
        """Which token positions of the next forward call to keep the FFN inputs of."""
        self._picked = torch.from_numpy(positions)

    def _sample_hook(self, layer: int) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            rows = args[0].reshape(-1, self.spec.d_model)[self._picked]
            self.inputs[layer] = rows.clamp(-65504, 65504).to(torch.float16)

        return hook

    def _count_hook(self, layer: int) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            fired = (output != 0).reshape(-1, output.shape[-1]).sum(0).numpy()
            start = self._position[layer]
            self.counts[layer, start : start + len(fired)] += fired
            self._position[layer] = (start + len(fired)) % self.spec.d_ff

        return hook


def record_profile(
    forward: Callable[[torch.Tensor], object],
    recorder: ActivationRecorder,
    windows: TokenWindows,
    settings: ProfileSettings,
    header: ArtifactHeader,
    partial: Path,
    progress: Progress,
) -> NeuronProfile:
    """Run `forward` over every window and return the profile.

    When interrupted, what was recorded so far is kept in the file `partial`, and a later call with the same header goes
    on from there; the caller removes the file once the profile is safe.
    """
    if windows.count == 0:
        raise CorpusError("there is no window of tokens to profile; give a corpus with text in it")
    context = windows.tokens.shape[1]
    held = min(_VALIDATION_WINDOWS, windows.count // 4)
    chosen = _sample_positions(windows, held, settings, recorder.spec)
    inputs = np.zeros((recorder.spec.n_layers, sum(map(len, chosen)), recorder.spec.d_model), np.float16)
    done = _resume(partial, header, recorder.counts, inputs)
    saved = monotonic()
    counted = recorder.counts.copy()
    firsts = np.cumsum([0, *map(len, chosen)])
    with recorder.recording(), progress("profile", windows.tokens.size, "token", done * context) as advance:
        try:
            for index in range(done, windows.count):
                recorder.pick(chosen[index])
                forward(torch.from_numpy(windows.tokens[index]))
                for layer, rows in enumerate(recorder.inputs):
                    inputs[layer, firsts[index] : firsts[index + 1]] = rows.numpy()
                # From here on the window counts; until here an interrupt leaves it to be run again.
                counted, done = recorder.counts.copy(), index + 1
                advance(context)
                if monotonic() - saved > _SAVE_SECONDS:
                    _save_partial(partial, header, counted, inputs, done)
                    saved = monotonic()
        except KeyboardInterrupt:
            _save_partial(partial, header, counted, inputs, done)
            raise KeyboardInterrupt(f"{done} of {windows.count} windows are kept, run it again to go on") from None
    documents = np.concatenate([windows.documents[index, at] for index, at in enumerate(chosen)])
    validation = windows.tokens[windows.count - held :].astype(np.int32)
    return NeuronProfile(header, recorder.counts, windows.tokens.size, inputs, documents, validation)


def _sample_positions(windows: TokenWindows, held: int, settings: ProfileSettings, spec: ModelSpec) -> list[np.ndarray]:
    """Which positions of each window to keep, drawn at random; none of a document in the last `held` windows."""
    first_held = windows.count - held
    free = np.flatnonzero(~np.isin(windows.documents, windows.documents[first_held:]))
    if len(np.unique(windows.documents.ravel()[free])) < 2:
        raise CorpusError(
            f"{windows.tokens.size:,} tokens are of too few documents to train predictors and check them on others; "
            "add text (a document is a JSONL line, or some 4,000 characters of plain text)"
        )
    total = min(len(free), settings.samples(spec, windows.tokens.size))
    flat = np.sort(np.random.default_rng(settings.seed).choice(free, total, replace=False))
    context = windows.tokens.shape[1]
    return np.split(flat % context, np.searchsorted(flat // context, np.arange(1, windows.count)))


def _partial_header(header: ArtifactHeader) -> ArtifactHeader:
    return ArtifactHeader(_PARTIAL_KIND, header.model_fingerprint, header.made_from)


def _save_partial(path: Path, header: ArtifactHeader, counts: np.ndarray, inputs: np.ndarray, done: int) -> None:
    write_tensors(path, _partial_header(header), {"counts": counts, "inputs": inputs, "done": np.array([done])})


def _resume(path: Path, header: ArtifactHeader, counts: np.ndarray, inputs: np.ndarray) -> int:
    """Fill `counts` and `inputs` from `path` if it belongs to the same run; returns how many windows it holds."""
    if not path.is_file():
        return 0
    try:
        found, tensors = read_tensors(path, _PARTIAL_KIND, header.model_fingerprint, REPAIR)
        if found != _partial_header(header) or tensors["inputs"].shape != inputs.shape:
            return 0
    except ArtifactError:
        return 0  # of another model, or unreadable: it is only a saving of time, and is written anew
    counts[:], inputs[:] = tensors["counts"], tensors["inputs"]
    return int(tensors["done"][0])
