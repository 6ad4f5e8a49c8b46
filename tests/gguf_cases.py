"""GGUF files in tests: small models and the shipped one, by parts of `scripts/gguf_model.py` and the gguf package.

`unpacked` writes the Hugging Face folder that holds the same numbers.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
from model_cases import SHAPE, make_model
from safetensors.torch import save_file

from hybrid.model.loader import ModelFolder

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import gguf_model

# Rows of whole blocks of 32, and of rows in our blocks one that is padded.
WIDE = SHAPE | {"hidden_act": "relu", "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6}


def write(model: Path, out: Path, kind: str, embedding: str | None = None, **metadata: object) -> Path:
    """Write the GGUF of a folder, its matrices as `kind`, which may be any type that the gguf package writes.

    embedding: the type of embedding and head, if another. metadata: keys to add, `__` for each dot; None: to leave out.
    """
    import gguf

    folder = ModelFolder.open(model)
    writer = gguf_model.new_writer(folder, out, "f32")
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        writer.kv_data[0].pop(key.replace("__", "."), None)
        if value is not None:
            add[type(value)](key.replace("__", "."), value)
    if (factors := gguf_model.rope_factors(folder.spec)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for part in gguf_model.parts(folder.spec):
        values = gguf_model.tensor_values(folder, part, np.dtype(np.float32))
        kept = embedding if embedding and part.name in ("token_embd.weight", "output.weight") else kind
        dtype = gguf.GGMLQuantizationType[kept.upper() if values.ndim > 1 else "F32"]
        writer.add_tensor(part.name, gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def make(tmp_path: Path, kind: str, embedding: str | None = None, name: str = "llama-relu", **changes: object) -> Path:
    """Write a small random model as a folder `model` and as `m.gguf` of `kind`; returns the latter."""
    make_model(name, tmp_path / "model", **(WIDE | changes))
    return write(tmp_path / "model", tmp_path / "m.gguf", kind, embedding)


def unpacked(path: Path, out: Path) -> Path:
    """Write the numbers of a GGUF file as a Hugging Face folder of f32."""
    folder = ModelFolder.open(path)
    out.mkdir()
    tensors = {name: folder.checkpoint.tensor(name, info.shape) for name, info in folder.checkpoint.infos.items()}
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(folder.config))
    for name, text in folder.codec.files().items():
        (out / name).write_text(text)
    return out


def header(tensors=(), metadata=(), version: int = 3) -> bytes:
    """The bytes of a GGUF header: tensors (name, shape innermost first, type, offset), metadata (key, type, bytes)."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    for key, kind, value in metadata:
        parts += [struct.pack("<Q", len(key)), key.encode(), struct.pack("<I", kind), value]
    for name, shape, kind, offset in tensors:
        parts += [struct.pack("<Q", len(name)), name.encode(), struct.pack("<I", len(shape))]
        parts += [struct.pack(f"<{len(shape)}Q", *shape), struct.pack("<IQ", kind, offset)]
    return b"".join(parts)
