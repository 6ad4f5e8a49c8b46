"""Train the small ReGLU Llama that ships as the embedded model, and write it as a Hugging Face folder.

The FFN is shaped like SwiGLU with ReLU as its gate (ReGLU), and a penalty on the share of firing neurons is raised
step by step until few neurons fire for any one token, after ProSparse (Song et al. 2024, arXiv:2402.13516), which
raises an L1 term so. Matrices are trained with Muon (Jordan et al. 2024), embeddings and norms with AdamW.

    python scripts/train_tiny.py --data DIR --out OUT

DIR holds `stories`, `chat` and `books`, each as `.bin` or `.bin.xz`: uint16 token ids, documents ending in the end
token. About 8 minutes on an H200. `--steps 3 --batch 2 --device cpu` only shows that everything works.
"""

from __future__ import annotations

import json
import lzma
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from hybrid.formats.new_folder import new_folder
from profiler.common.errors import CorpusError, HybridError, InputError, ModelError

STREAMS = ("stories", "chat", "books")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
EMBEDDED_MODEL = Path(__file__).parents[1] / "hybrid" / "embedded" / "model"
ADAM_LR, MUON_LR = 3e-3, 0.02


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model, in the field names of a Hugging Face `config.json`. The embedding is tied to the head."""

    vocab_size: int = 8192
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 1024


@dataclass(frozen=True)
class TrainConfig:
    """How to train: `batch` sequences of `seq` tokens per step, until `steps` or `minutes` are over.

    `fire` is the share of FFN neurons that should fire per token at the end. Raises `InputError` on a bad value.
    """

    steps: int = 6000
    batch: int = 192
    seq: int = 512
    fire: float = 0.08
    minutes: float = 14.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seq", "minutes"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not 0 < self.fire <= 0.5:
            raise InputError(f"fire is {self.fire}, expected a share above 0 and up to 0.5")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout; x is (..., T, head_dim), cos and sin are (T, head_dim)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

        q = rotate(split(self.q_proj(x), self.heads), cos, sin)
        k = rotate(split(self.k_proj(x), self.kv_heads), cos, sin)
        v = split(self.v_proj(x), self.kv_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class ReGLU(nn.Module):
    """down(relu(gate(x)) * up(x)); also returns a smooth firing share, which has a gradient, and the true one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate = self.gate_proj(x)
        # The sigmoid's width follows the gate's own scale, held fixed, so that neither shrinking the gate nor one
        # huge activation lowers the penalty: only fewer firing neurons do.
        z = gate.float()
        soft = torch.sigmoid(z / (0.3 * z.abs().mean().detach() + 1e-6)).mean()
        return self.down_proj(F.relu(gate) * self.up_proj(x)), soft, (gate > 0).float().mean()


class Block(nn.Module):
    """One decoder layer: attention and FFN, each behind a norm and around a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ReGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y, soft, firing = self.mlp(self.post_attention_layernorm(x))
        return x + y, soft, firing


class TinyLlama(nn.Module):
    """The model, with the parameter names of `LlamaModel` in transformers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        residual = 1 / math.sqrt(2 * config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 * (residual if into_residual else 1))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids (B, T) -> logits (B, T, vocab), smooth firing share averaged over layers, true firing share (layers,)."""
        half = torch.arange(0, self.config.head_dim, 2, device=ids.device).float() / self.config.head_dim
        angle = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), self.config.rope_theta**-half)
        angle = torch.cat((angle, angle), -1)
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        x, softs, firings = self.embed_tokens(ids), [], []
        for layer in self.layers:
            x, soft, firing = layer(x, cos, sin)
            softs.append(soft)
            firings.append(firing)
        return F.linear(self.norm(x), self.embed_tokens.weight), torch.stack(softs).mean(), torch.stack(firings)


def load_stream(folder: Path, name: str, config: TrainConfig, vocab_size: int) -> Tensor:
    """Token ids (n,) int32 of `name`.bin or `name`.bin.xz in `folder`; raises `CorpusError` when unusable."""
    plain, packed = folder / f"{name}.bin", folder / f"{name}.bin.xz"
    path = plain if plain.is_file() else packed
    try:
        content = path.read_bytes() if path == plain else lzma.decompress(path.read_bytes())
        ids = np.frombuffer(content, dtype=np.uint16)
    except FileNotFoundError:
        raise CorpusError(f"{plain} and {packed} are both missing; pass the folder of token files as --data") from None
    except (lzma.LZMAError, ValueError) as error:
        raise CorpusError(f"{path} is not a file of uint16 token ids ({error}); write it again") from error
    # The held-out tail must give a whole window, and so must the rest.
    shortest = 51 * (config.seq + 2)
    if len(ids) < shortest:
        raise CorpusError(f"{path} holds {len(ids)} tokens, expected {shortest} or more; add text or lower --seq")
    if ids.max() >= vocab_size:
        raise CorpusError(f"{path} holds token id {ids.max()}, the vocabulary has {vocab_size}; tokenize it again")
    return torch.from_numpy(ids.astype(np.int32))


def held_out_size(stream: Tensor) -> int:
    """Tokens at the end of a stream that are kept from training."""
    return 200_000 if len(stream) > 4_000_000 else len(stream) // 50


def mixture(progress: float) -> dict[str, float]:
    """Share of each stream in a batch; the last 40% of training leans to chat, which is what the model is for."""
    if progress < 0.6:
        return {"stories": 0.15, "chat": 0.55, "books": 0.30}
    return {"stories": 0.12, "chat": 0.78, "books": 0.10}


def learning_rate_scale(step: int, progress: float) -> float:
    """Warm-up over 100 steps, flat to half of the training, then linear down to 2%."""
    return min(1.0, step / 100) * (1.0 if progress < 0.5 else max(0.02, (1 - progress) / 0.5))


def target_firing(progress: float, final: float) -> float:
    """Firing share to aim at: from one half down to `final` at 60% of the training, on a line in log space."""
    return max(final, 0.5 * (final / 0.5) ** min(1.0, progress / 0.6))


def next_penalty(weight: float, firing: float, target: float) -> float:
    """Raise the weight of the firing penalty by 1% while too many neurons fire, else ease it; kept in [1e-3, 3]."""
    return min(3.0, max(1e-3, weight * (1.01 if firing > target else 1 / 1.01)))


def sample_batch(streams: Mapping[str, Tensor], shares: Mapping[str, float], config: TrainConfig) -> Tensor:
    """Random windows (about `batch`, seq + 1) int64, drawn from each stream by its share."""
    windows = []
    for name, share in shares.items():
        stream = streams[name]
        start = torch.randint(0, len(stream) - config.seq - 1, (round(config.batch * share),), device=stream.device)
        windows.append(stream[start[:, None] + torch.arange(config.seq + 1, device=stream.device)])
    return torch.cat(windows).long()


def losses(model: Callable[..., Any], ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy per token (nats), smooth firing share and firing share per layer over ids (B, T + 1)."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, soft, firing = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()), soft, firing


@torch.no_grad()
def evaluate(model: TinyLlama, held_out: Mapping[str, Tensor], config: TrainConfig) -> dict[str, tuple[float, list]]:
    """Per stream: cross-entropy (nats) and firing share per layer over at most 128 held-out windows."""
    result, size = {}, config.seq + 1
    for name, stream in held_out.items():
        # never more windows than were trained on, so that a trial of a few steps stays short
        count = min(len(stream) // size, 128, config.steps * config.batch)
        entropy, _, firing = losses(model, stream[: count * size].view(count, size).long())
        result[name] = (round(entropy.item(), 4), [round(share, 3) for share in firing.tolist()])
    return result


def train(model: TinyLlama, streams: Mapping[str, Tensor], config: TrainConfig) -> list[dict[str, Any]]:
    """Train `model` in place on `streams`, which lie on its device; returns a row for every 200th step.

    Each row also goes to stderr. Raises `HybridError` when the loss is no longer finite.
    """
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    on_gpu = others[0].is_cuda
    # torch.optim.Muon's own momentum (0.95, Nesterov) and five Newton-Schulz steps
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.1)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu)
    network = torch.compile(model) if on_gpu else model
    start, penalty, fired = time.monotonic(), 0.02, 0.5
    rows: list[dict[str, Any]] = []
    for step in range(config.steps):
        minutes = (time.monotonic() - start) / 60
        progress = max(step / config.steps, minutes / config.minutes)
        if progress >= 1:
            break
        penalty = next_penalty(penalty, fired, target_firing(progress, config.fire))
        entropy, soft, firing = losses(network, sample_batch(streams, mixture(progress), config))
        (entropy + penalty * soft).backward()
        if step % 10 == 0:  # reading it waits for the GPU, so not at every step
            fired = firing.mean().item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = learning_rate_scale(step, progress)
        for optimizer, rate in ((adam, ADAM_LR), (muon, MUON_LR)):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if step % 200 == 0:
            row = {"ce": entropy.item(), "soft": soft.item(), "fire": fired, "lam": penalty, "min": minutes}
            if not math.isfinite(row["ce"]):
                raise HybridError(f"the loss is {row['ce']} at step {step}; try another --seed")
            rows.append({"step": step, **{name: round(value, 4) for name, value in row.items()}})
            click.echo(json.dumps(rows[-1]), err=True)
    return rows


def special_ids(tokenizer: Path, vocab_size: int) -> dict[str, int]:
    """Ids of the begin, end and padding token of `tokenizer`, a model folder.

    Raises `ModelError` unless the folder has every file needed and no more than `vocab_size` entries.
    """
    missing = [name for name in TOKENIZER_FILES if not (tokenizer / name).is_file()]
    if missing:
        raise ModelError(f"{tokenizer} lacks {', '.join(missing)}; pass a model folder as --tokenizer")
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    size = vocabulary.get_vocab_size()
    if size > vocab_size:
        raise ModelError(f"the tokenizer in {tokenizer} has {size} entries, the model {vocab_size}; pass a smaller one")
    named = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {f"{name}_token_id": vocabulary.token_to_id(named[f"{name}_token"]) for name in ("bos", "eos", "pad")}
    return {name: token for name, token in ids.items() if token is not None}


def save_model(model: TinyLlama, tokenizer: Path, log: Mapping[str, Any], out: Path) -> None:
    """Write weights (bf16, one file), config, the tokenizer files of a model folder, and `log` to the new `out`."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "relu",
        **asdict(model.config),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **special_ids(tokenizer, model.config.vocab_size),
    }
    weights = {f"model.{name}": value.bfloat16().cpu().contiguous() for name, value in model.state_dict().items()}
    with new_folder(out, 0, "--out", replaces=False) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        for name, content in (("config.json", config), ("train_log.json", log)):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, folder / name)


def make_model(data: Path, tokenizer: Path, out: Path, config: TrainConfig, device: str, shape: ModelConfig) -> None:
    """Train a model of `shape` on the token files in `data` and write it to the new folder `out`.

    Raises `InputError` or a subclass, before any training, when an input is unusable; `HybridError` when it fails.
    """
    if out.exists():
        raise InputError(f"{out} already exists; move it away or choose another folder as --out")
    if config.seq > shape.max_position_embeddings:
        raise InputError(f"seq is {config.seq}, the model has {shape.max_position_embeddings} positions; lower --seq")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA device; pass --device cpu for a trial of a few steps")
    special_ids(tokenizer, shape.vocab_size)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    streams = {name: load_stream(data, name, config, shape.vocab_size).to(device) for name in STREAMS}
    held_out = {name: stream[-held_out_size(stream) :] for name, stream in streams.items()}
    streams = {name: stream[: -held_out_size(stream)] for name, stream in streams.items()}
    model = TinyLlama(shape).to(device)
    rows = train(model, streams, config)
    final = evaluate(model, held_out, config)
    click.echo(json.dumps({"final": final}), err=True)
    save_model(model, tokenizer, {"config": asdict(shape), "args": asdict(config), "log": rows, "final": final}, out)


@click.command(help="Train the embedded ReGLU Llama from token files and write a Hugging Face folder.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the three token files.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    default=EMBEDDED_MODEL,
    help="Model folder whose tokenizer made them.  [default: the embedded model's]",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder to write.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--steps", type=int, default=TrainConfig.steps, show_default=True)
@click.option("--batch", type=int, default=TrainConfig.batch, show_default=True, help="Sequences per step.")
@click.option("--seq", type=int, default=TrainConfig.seq, show_default=True, help="Tokens per sequence.")
@click.option("--fire", type=float, default=TrainConfig.fire, show_default=True, help="Final share of firing neurons.")
@click.option("--minutes", type=float, default=TrainConfig.minutes, show_default=True, help="Stop after so long.")
@click.option("--seed", type=int, default=TrainConfig.seed, show_default=True)
def main(data: Path, tokenizer: Path, out: Path, device: str, **settings: Any) -> None:
    """Command line of this script."""
    try:
        make_model(data, tokenizer, out, TrainConfig(**settings), device, ModelConfig())
    except HybridError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
