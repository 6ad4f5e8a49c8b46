"""From a model to a built `Transformer`: spec, checkpoint, and weights laid out as the placement asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpu_kernels.low_rank import PredictorView
from hybrid.errors import InputError
from hybrid.formats.bundle import Bundle
from hybrid.formats.checkpoint import Checkpoint
from hybrid.formats.config import parse_config, read_json
from hybrid.formats.folder import require_model
from hybrid.formats.generation_config import GenerationDefaults, generation_defaults
from hybrid.formats.gguf_checkpoint import GGUFCheckpoint
from hybrid.formats.gguf_codec import GGUFCodec, gguf_defaults
from hybrid.formats.packed import PackedModel, packed_spec
from hybrid.formats.packed_predictors import open_predictors
from hybrid.formats.tensors import TensorNames, check_tensors
from hybrid.formats.text import TextCodec
from hybrid.model.ffn import FFNRuntime, HybridFFN
from hybrid.model.gguf_run import open_run_form
from hybrid.model.kv_range import needs_wide_kv
from hybrid.model.reader import CheckpointReader, FFNTensors, MatrixReader, PackedReader, Reader
from hybrid.model.transformer import Attention, Block, LayerNorms, Linear, Transformer
from placement.placement import Placement
from predictor.bank import PredictorBank
from predictor.proxy import ProxyBank
from profiler.common.spec import DType, KVChoice, ModelSpec

_DTYPE_NAMES: dict[str, DType] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A Hugging Face or packed model folder, or a GGUF file: spec and weights, opened and checked, and what to know.

    Of the weights only keys' and values' are read, and a tied embedding where the head is stored too.
    """

    path: Path
    spec: ModelSpec
    weights: Checkpoint | PackedModel
    notices: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """Read config and tensor tables. Raises `ModelError` for what is missing, truncated, unknown or too much."""
        path = path.absolute()
        require_model(path)
        if PackedModel.is_packed(path):
            packed = PackedModel.open(path)
            return cls(path, packed.spec, packed, _kv_notice(packed.spec))
        notices: list[str] = []
        checkpoint, config, where = _opened(path)
        spec = parse_config(config, str(where), notices=notices)
        spec = replace(spec, tied=_is_tied(spec, checkpoint, notices))
        check_tensors(spec, checkpoint, notices)
        up = TensorNames(spec, checkpoint).of("up", 0)
        dtype = _DTYPE_NAMES[checkpoint.infos[f"{up}.weight"].dtype]
        wide = needs_wide_kv(spec, CheckpointReader(spec, checkpoint))
        spec = replace(spec, dtype=dtype, wide_kv=wide, fingerprint=checkpoint.fingerprint(config))
        if isinstance(checkpoint, GGUFCheckpoint):
            spec = packed_spec(spec, checkpoint.blocks) if checkpoint.blocks else spec
            notices += checkpoint.notices(spec.model_bytes)
        return cls(path, spec, checkpoint, (*notices, *_kv_notice(spec)))

    def with_kv(self, kv: KVChoice) -> ModelFolder:
        """The same, to be run with keys and values kept so."""
        notices = tuple(notice for notice in self.notices if notice not in _kv_notice(self.spec))
        spec = replace(self.spec, kv=kv)
        return replace(self, spec=spec, notices=(*notices, *_kv_notice(spec)))

    @cached_property
    def codec(self) -> TextCodec:
        """The model's tokenizer and chat template. Raises `ModelError` when they cannot be used."""
        if isinstance(self.weights, GGUFCheckpoint):
            return GGUFCodec(self.weights.file, self.spec.vocab_size)
        return TextCodec(self.path, self.spec.vocab_size)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says, or would say of a GGUF file."""
        return self.weights.config if isinstance(self.weights, GGUFCheckpoint) else read_json(self.path / "config.json")

    @property
    def defaults(self) -> GenerationDefaults:
        """How answers are made. Raises `ModelError` for end tokens that are no ids."""
        if isinstance(self.weights, GGUFCheckpoint):
            return gguf_defaults(self.weights.file)
        return generation_defaults(self.path)

    @property
    def is_packed(self) -> bool:
        return isinstance(self.weights, PackedModel)

    @property
    def checkpoint(self) -> Checkpoint:
        """The Hugging Face weights. Raises `InputError` for a packed folder, which has none."""
        if isinstance(self.weights, PackedModel):
            raise InputError(f"{self.path} is packed; profile and train the model that it was packed from")
        return self.weights

    def check_finite(self) -> None:
        """Read all of a checkpoint's weights; a packed folder's were read when it was packed.

        Raises `ModelError` for a tensor with infinite numbers or NaN.
        """
        if isinstance(self.weights, Checkpoint):
            self.weights.check_finite()

    def ffn_tensors(self, layer: int) -> FFNTensors:
        """One layer's neurons in the checkpoint's order; `down` is a transposed view. Raises as `checkpoint` does."""
        return CheckpointReader(self.spec, self.checkpoint).ffn(layer)

    def build(
        self,
        runtime: FFNRuntime,
        placement: Placement | None,
        bank: PredictorBank | None,
        bundle: Bundle | None = None,
        proxies: ProxyBank | None = None,
    ) -> Transformer:
        """Read every weight, or map it where the folder is packed. Without a placement all neurons are cold.

        bundle: where a GGUF model of blocks has its run-time form, which is written there first, and where copies of
        rows are for the strategy `certified`, and those for `proxy` unless `proxies` are given.

        A packed folder has its own predictors, which serve the strategy `learned` where there is no `bank`. Raises
        `ArtifactError` when they are missing, or for a placement other than that which the folder was packed by.
        """
        reader: Reader
        mapped: list[PredictorView] = []
        if isinstance(self.weights, PackedModel):
            if placement is not None:
                self.weights.check_order(placement.order)
            self.weights.advise(runtime.strategy != "dense")
            reader = PackedReader(self.weights, runtime)
            if runtime.strategy == "learned" and bank is None:
                mapped = open_predictors(self.path, self.spec, self.weights.order)
        elif isinstance(self.weights, GGUFCheckpoint) and self.weights.blocks:
            order = None if placement is None else placement.order
            place = (bundle or Bundle.of(self.path, self.spec)).path
            run = open_run_form(self.spec, self.weights, order, place)
            run.advise(runtime.strategy != "dense")
            reader = PackedReader(run, runtime)
        else:
            reader = MatrixReader(self.spec, self.weights, placement, runtime)
        blocks = [self._block(reader, layer, runtime, placement, bank) for layer in range(self.spec.n_layers)]
        for block, predictor in zip(blocks, mapped, strict=False):
            block.ffn.set_predictor(predictor)
        order = None if placement is None else placement.order
        if runtime.strategy == "certified" and bundle is not None:
            self.use_copies([block.ffn for block in blocks], bundle, order)
        if runtime.strategy == "proxy" and (proxies is not None or bundle is not None):
            by = proxies if proxies is not None or bundle is None else bundle.load_proxies(self.spec)
            self.use_proxies([block.ffn for block in blocks], by, order)
        embedding, positions, norm = reader.embedding(), reader.positions(), reader.norm("final_norm")
        assert norm is not None
        head = embedding if self.spec.tied else reader.head()
        return Transformer(self.spec, embedding, positions, blocks, norm, Linear(head, None, runtime))

    def use_copies(self, ffns: Sequence[HybridFFN], bundle: Bundle, order: np.ndarray | None = None) -> None:
        """Have layers certify neurons by the copies of `bundle`. order: of the neurons, int [n_layers, d_ff]; None for
        the checkpoint's, or that which a folder is packed in. Raises `ArtifactError`."""
        if isinstance(self.weights, PackedModel):
            order = self.weights.order
        with bundle.open_copies(self.spec) as stored:
            for layer, ffn in enumerate(ffns):
                found = stored.layer(layer)
                ffn.set_copies(found if order is None else found.reordered(order[layer]))

    def use_proxies(self, ffns: Sequence[HybridFFN], proxies: ProxyBank | None, order: np.ndarray | None) -> None:
        """Have layers name neurons by `proxies`, or none; order: as for `use_copies`."""
        if isinstance(self.weights, PackedModel):
            order = self.weights.order
        for layer, ffn in enumerate(ffns):
            found = None if proxies is None else proxies.layer(layer)
            ffn.set_proxy(found if found is None or order is None else found.reordered(order[layer]))

    def _block(
        self, reader: Reader, layer: int, runtime: FFNRuntime, placement: Placement | None, bank: PredictorBank | None
    ) -> Block:
        predictor = bank.predictors[layer] if bank is not None else None
        hot = 0
        if placement is not None:
            hot = int(placement.hot[layer])
            order = torch.from_numpy(placement.order[layer]).long()
            predictor = predictor.reordered(order) if predictor is not None else None
        ffn = HybridFFN(reader.ffn(layer), self.spec.activation, hot, predictor, runtime)
        attention = Attention(self.spec, layer, *reader.attention(layer))
        names = ("attention_norm", "ffn_norm", "attention_post_norm", "ffn_post_norm")
        return Block(LayerNorms(*(reader.norm(name, layer) for name in names)), attention, ffn, self.spec.parallel)


def _opened(path: Path) -> tuple[Checkpoint, dict[str, Any], Path]:
    """The weights, config.json's fields, and where those are from."""
    if path.is_file():
        checkpoint = GGUFCheckpoint(path)
        return checkpoint, checkpoint.config, path
    config = read_json(path / "config.json")
    return Checkpoint(path), config, path / "config.json"


def _is_tied(spec: ModelSpec, checkpoint: Checkpoint, notices: list[str]) -> bool:
    """Whether the head is the embedding: where both are stored and differ, it is not, whatever config.json says."""
    names = TensorNames(spec, checkpoint)
    embedding, head = (f"{names.of(part)}.weight" for part in ("embedding", "head"))
    if not spec.tied or embedding == head or not {embedding, head} <= checkpoint.infos.keys():
        return spec.tied
    if checkpoint.same(embedding, head, (spec.vocab_size, spec.d_model)):
        return True
    notices.append(
        "config.json ties the head to the embedding, but a head that differs is stored: the stored one is used"
    )
    return False


def _kv_notice(spec: ModelSpec) -> tuple[str, ...]:
    if not spec.wide_kv or spec.dtype == "f32" or spec.kv == "int8":
        return ()
    return ("f16 does not hold this model's keys and values: they are kept in f32, in twice the memory",)
