"""A reader of PowerInfer's files and its arithmetic, from their description alone, to hold our writer against."""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bundle_cases import random_bundle, random_profile
from model_cases import make_model
from safetensors.torch import load_file, save_file

from hybrid.formats.powerinfer import Kind, Tensor, write
from hybrid.offline.project import Project
from profiler.common.progress import no_progress

SCALARS = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}
ARRAYS = {5: np.int32, 6: np.float32}
PLAIN = {0: np.float32, 1: np.float16, 18: np.int32}
BLOCK_BYTES = {2: 18, 8: 34}


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        size = self.take("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self) -> Any:
        kind = self.take("<I")
        if kind == 8:
            return self.text()
        if kind != 9:
            return self.take(SCALARS[kind])
        kind, count = self.take("<I"), self.take("<Q")
        if kind == 8:
            return [self.text() for _ in range(count)]
        self.at += 4 * count
        return np.frombuffer(self.data, ARRAYS[kind], count, self.at - 4 * count)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, int]]:
    """Metadata, tensors by name in the order of the file, and their types' ids."""
    source = _Bytes(path.read_bytes())
    assert source.data[:4] == b"PWRI"
    source.at = 4
    version, count, entries = source.take("<I"), source.take("<Q"), source.take("<Q")
    assert version == 3
    metadata = {source.text(): source.value() for _ in range(entries)}
    infos = []
    for _ in range(count):
        name = source.text()
        sizes = [source.take("<Q") for _ in range(source.take("<I"))]
        infos.append((name, tuple(reversed(sizes)), source.take("<I"), source.take("<Q")))
    start = source.at + -source.at % 32
    tensors = {name: _values(source.data, start + offset, shape, kind) for name, shape, kind, offset in infos}
    assert all(offset % 32 == 0 for *_, offset in infos)
    return metadata, tensors, {name: kind for name, _, kind, _ in infos}


def _values(data: bytes, start: int, shape: tuple[int, ...], kind: int) -> np.ndarray:
    count = int(np.prod(shape))
    if kind in PLAIN:
        return np.frombuffer(data, PLAIN[kind], count, start).reshape(shape)
    raw = np.frombuffer(data, np.uint8, count // 32 * BLOCK_BYTES[kind], start).reshape(-1, BLOCK_BYTES[kind])
    scales, codes = raw[:, :2].copy().view(np.float16).astype(np.float32), raw[:, 2:]
    if kind == 2:
        codes = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32) - 8
    else:
        codes = codes.view(np.int8).astype(np.float32)
    return (codes * scales).reshape(shape)


def normed(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotated(x: np.ndarray, theta: float) -> np.ndarray:
    """x [t, heads, size]: neighbours are turned by their position, as llama.cpp does."""
    size = x.shape[-1]
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    out = np.empty_like(x)
    out[..., ::2], out[..., 1::2] = x[..., ::2] * cos - x[..., 1::2] * sin, x[..., ::2] * sin + x[..., 1::2] * cos
    return out


def logits(path: Path, tokens: list[int], sparse: bool) -> tuple[np.ndarray, float]:
    """PowerInfer's answer, f64 [t, vocabulary], and the share of neurons that its predictors choose."""
    about, stored, _ = read_file(path)
    w = {name: values.astype(np.float64) for name, values in stored.items()}
    eps, heads, groups = (
        about[f"llama.attention.{n}"] for n in ("layer_norm_rms_epsilon", "head_count", "head_count_kv")
    )
    x, chosen = w["token_embd.weight"][tokens], []
    t, d = x.shape
    mask = np.where(np.tri(t), 0, -np.inf)
    for layer in range(about["llama.block_count"]):
        at = {name.split(".")[2]: values for name, values in w.items() if name.startswith(f"blk.{layer}.")}
        h = normed(x, at["attn_norm"], eps)
        q, k, v = (h @ at[f"attn_{part}"].T for part in "qkv")
        q = rotated(q.reshape(t, heads, -1), about["llama.rope.freq_base"])
        k = rotated(k.reshape(t, groups, -1), about["llama.rope.freq_base"]).repeat(heads // groups, 1)
        v = v.reshape(t, groups, -1).repeat(heads // groups, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / (d // heads) ** 0.5 + mask
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(t, d) @ at["attn_output"].T
        active = np.maximum(x @ at["fc1"].T, 0) @ at["fc2"].T >= 0 if sparse else np.ones((t, len(at["ffn_up"])), bool)
        chosen.append(active.mean())
        h = normed(x, at["ffn_norm"], eps)
        x = x + (np.maximum(h @ at["ffn_gate"].T, 0) * (h @ at["ffn_up"].T) * active) @ at["ffn_down_t"]
    return normed(x, w["output_norm.weight"], eps) @ w["output.weight"].T, float(np.mean(chosen))


def exact_in_f16(folder: Path) -> None:
    """Round the weights of a model folder of f32 to what f16 holds."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half().float() for name, tensor in tensors.items()}, folder / "model.safetensors")


def prepared(folder: Path, name: str = "llama-relu", layers: int = 3, **changes: object) -> Project:
    """A small random model with random artefacts, whose profile has inputs enough to be exported."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": layers}
    make_model(name, folder, **(shape | changes))
    exact_in_f16(folder)
    made = Project(folder, None, 1, no_progress)
    random_bundle(made.bundle, made.spec)
    few = random_profile(made.spec)
    replace(few, inputs=few.inputs.repeat(4, axis=1), documents=few.documents.repeat(4)).save(made.bundle.profile)
    return made


def changed(path: Path, out: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray | None]) -> Path:
    """Write a file of f16 anew with other metadata and tensors; None: without it."""
    about, stored, ids = read_file(path)
    kinds: dict[int, Kind] = {0: "f32", 1: "f16"}
    kept = {name: values for name, values in (stored | tensors).items() if values is not None}
    write(
        out,
        {name: value for name, value in (about | metadata).items() if value is not None},
        [Tensor(name, values.shape, kinds[ids[name]], partial(np.asarray, values)) for name, values in kept.items()],
    )
    return out
