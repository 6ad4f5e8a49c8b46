"""`hybrid pack`: a model's weights, once more, as the kernels want them; `hybrid.formats.packed` says what is written.

Threads: a few read blocks of rows and turn them into their run-time type; the calling thread writes them, in order. A
block is 8 MiB of f32 and there are at most `MOST_CODERS` + 1 of them: memory stays at one source tensor that is mapped
while it is read, whatever the model's size. Everything goes to a temporary folder that is renamed once all of it
was read back and held against its digests and the source; a killed run leaves that folder, the next run removes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from threadpoolctl import threadpool_limits

from cpu_kernels.blocks import FORMATS, dequantize, quantize
from cpu_kernels.lanes import widen_ref
from hybrid.errors import ArtifactError, InputError, ModelError
from hybrid.formats.bundle import Bundle
from hybrid.formats.gguf_checkpoint import GGUFCheckpoint
from hybrid.formats.gguf_codec import GGUFCodec
from hybrid.formats.new_folder import copy_if_changed, new_folder
from hybrid.formats.packed import (
    ALIGNMENT,
    KIND,
    PACKED_FILE,
    PackedDType,
    PackedModel,
    Part,
    config_hash,
    open_packed,
    order_hash,
    packed_spec,
    parts,
    split_name,
)
from hybrid.formats.packed_predictors import pack_predictors
from hybrid.formats.tensors import TensorNames
from hybrid.model.coders import coders, in_order
from hybrid.model.gguf_parts import BlockParts
from hybrid.model.loader import ModelFolder
from hybrid.offline.pack_check import within_bounds
from hybrid.offline.pack_feedback import FFNFeedback
from hybrid.offline.pack_source import Source
from placement.placement import Placement
from predictor.bank import open_bank
from profiler.common.artifact import ArtifactHeader, TensorWriter, digest_of, read_header
from profiler.profile import NeuronProfile, StoredInputs

Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]

_TAKEN_OVER = {("int8", "int8"), ("int4", "int4"), ("int4", "int8")}  # blocks of the source, and of the copy
_Check = tuple[np.ndarray, bool, np.ndarray]
# What a model folder may hold beside its weights: configuration, tokenizer, and what its licence asks to go along.
_COPIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "LICENSE*", "NOTICE*", "USE_POLICY*", "README*")


@dataclass(frozen=True)
class PackResult:
    """The packed folder, the bytes of all that is in it, and whether its weights had to be `written`.

    errors: what the rounding of matrices that were written cost, root mean square as a share of the weights', by part.
    """

    folder: Path
    nbytes: int
    written: bool
    errors: Mapping[str, float]


class Packer:
    """One model, the type it shall have, and the neuron order of its bundle's placement."""

    def __init__(self, folder: ModelFolder, bundle: Bundle, dtype: PackedDType, progress: Progress) -> None:
        """Raises `ModelError` or `ArtifactError` when a tensor is missing or an artefact is damaged or another model's.

        A bundle need not have artefacts, but those that it has go along or steer the rounding.
        """
        self._folder, self._bundle, self._dtype, self._progress = folder, bundle, dtype, progress
        placement = bundle.load_placement(folder.spec) if bundle.placement.is_file() else None
        self._order = placement.order if placement else Placement.all_cold(folder.spec).order
        self._spec = packed_spec(folder.spec, dtype)
        self._parts = list(parts(self._spec))
        names = TensorNames(folder.spec, folder.checkpoint)
        self._sources = {
            part.name: Source.of(part, folder.spec, names, self._order) for part in self._parts if part.name != "order"
        }
        for source in self._sources.values():
            for stored in source.parts:
                folder.checkpoint.info(stored.name, stored.shape)
        spec = folder.spec
        self.profile = bundle.load_profile(spec, samples=False) if bundle.profile.is_file() else None
        if bundle.predictors.is_file():
            with open_bank(bundle.predictors, spec, bundle.repair) as bank:
                bank.file.check()
        # Only int4 errs so much that error feedback pays; it needs the profile's sample of FFN inputs.
        inputs = (
            StoredInputs.open(bundle.profile, spec, bundle.repair) if dtype == "int4" and self._has_samples else None
        )
        self._feedback = FFNFeedback(inputs, spec, folder.checkpoint, self._sources) if inputs else None
        self._codes = self._own_codes()
        self._lost: dict[str, np.ndarray] = {}  # by part, squared: of errors and of weights

    @property
    def _has_samples(self) -> bool:
        return self.profile is not None and not self.profile.is_imported

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(part.nbytes for part in self._parts)

    def _own_codes(self) -> BlockParts | None:
        """What takes codes over from a GGUF file whose blocks hold the same numbers as those of the type asked for."""
        checkpoint, dtype = self._folder.checkpoint, self._dtype
        if not isinstance(checkpoint, GGUFCheckpoint) or (checkpoint.blocks, dtype) not in _TAKEN_OVER:
            return None
        return BlockParts(self._spec, checkpoint, self._order)

    def pack(self, out: Path) -> PackResult:
        """Write and verify `out`; weights that are there already, from the same model, are not written again.

        Raises `InputError` when `out` is something else or cannot be written, `ModelError` for weights that the type
        cannot hold.
        """
        if written := not self._is_current(out):
            with new_folder(out, self.nbytes) as temporary:
                self._copy_files(temporary)
                with (temporary / PACKED_FILE).open("wb") as file:
                    self._write(file)
                self.verify(temporary)
                self._copy_artefacts(temporary)
        else:
            self._copy_artefacts(out)
        nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        errors = {name: float(np.sqrt(lost / of)) for name, (lost, of) in self._lost.items() if lost}
        return PackResult(out, nbytes, written, errors)

    def _is_current(self, out: Path) -> bool:
        """Whether `out` holds these weights. Raises `InputError` for what must not be replaced."""
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return False
        try:
            found = read_header(out / PACKED_FILE, KIND, self._folder.spec.fingerprint, "hybrid pack")
        except ArtifactError as error:
            raise InputError(
                f"{out} exists and is not a packed copy of this model; remove it, or choose another folder with -o"
            ) from error
        return found.key == self._header().key and self._is_whole(out)

    def _is_whole(self, out: Path) -> bool:
        """Whether the weights of `out` are what was written; not those of an earlier version, which has no digests."""
        try:
            PackedModel.open(out)
            with open_packed(out) as file, self._progress("check", self.nbytes, "byte") as advance:
                file.check(advance)
                return file.digests is not None
        except (ArtifactError, ModelError):
            return False

    def _header(self) -> ArtifactHeader:
        made_from = {
            "source": self._folder.spec.fingerprint,
            "config": config_hash(self._folder.config),
            "dtype": self._dtype,
            "order": order_hash(self._order),
            "wide_kv": self._spec.wide_kv,
            "profile": self.profile.header.key if self.profile and self._feedback else None,
        }
        return ArtifactHeader(KIND, self._folder.spec.fingerprint, made_from)

    def _copy_files(self, target: Path) -> None:
        codec = self._folder.codec if isinstance(self._folder.weights, GGUFCheckpoint) else None
        if isinstance(codec, GGUFCodec):
            (target / "config.json").write_text(json.dumps(self._folder.config, indent=1), encoding="utf-8")
            for name, text in codec.files().items():
                (target / name).write_text(text, encoding="utf-8")
            return
        found = {path for pattern in _COPIED for path in self._folder.path.glob(pattern)}
        for path in sorted(found):
            if path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, target / path.name)

    def _copy_artefacts(self, out: Path) -> None:
        """The source's artefacts as they are now, so that they fit the weights and each other; of the profile only what
        a packed model needs."""
        bundle = self._bundle
        if self.profile:
            self._copy_profile(self.profile, out / "hybrid" / bundle.profile.name)
        # Certificates bound the rounding of the very rows, so they go along where these stay as they are.
        same = self._spec.dtype == self._folder.spec.dtype
        copies = () if self._spec.fires_sparsely and not same else (bundle.copies,)
        for path in (bundle.predictors, bundle.report, bundle.placement, bundle.proxy, *copies):
            if path.is_file():
                copy_if_changed(path, out / "hybrid" / path.name)
        if bundle.predictors.is_file():
            pack_predictors(bundle.predictors, self._spec, self._order, out)

    def _copy_profile(self, profile: NeuronProfile, target: Path) -> None:
        try:
            found = NeuronProfile.load(target, self._folder.spec)
            same = found.header.key == profile.header.key and np.array_equal(found.counts, profile.counts)
        except ArtifactError:
            same = False  # none there, or a damaged one
        if not same or found.inputs.size:
            profile.save(target)

    def _write(self, file: BinaryIO) -> None:
        writer = TensorWriter(file, self._header(), [part.entry for part in self._parts], ALIGNMENT)
        # The coders are the threads: those of BLAS beside them made error feedback 5 to 50 times slower.
        with self._progress("pack", self.nbytes, "byte") as advance, coders() as threads, threadpool_limits(1, "blas"):
            for part in self._parts:
                writer.add(part.name, _advancing(self._stored(part, threads), advance))
        writer.finish()

    def _is_taken(self, part: Part) -> bool:
        return self._codes is not None and self._codes.takes(part)

    def _is_fed(self, part: Part) -> bool:
        """Whether `part` is rounded with error feedback."""
        layer, name, kind = split_name(part.name)
        return (
            bool(self._feedback)
            and not self._is_taken(part)
            and layer is not None
            and name in ("gate", "up", "down")
            and kind == "weight"
        )

    def _stored(self, part: Part, threads: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """The bytes of `part`, block after block, made by `coders` a few blocks ahead."""
        if part.name == "order":
            yield self._order.astype(np.int32)
            return
        try:
            yield from in_order(self._tasks(part), threads)
        except ValueError as error:
            raise ModelError(
                f"weights for '{part.name}': {error}; check the model's files, or try --dtype bf16"
            ) from error

    def _tasks(self, part: Part) -> Iterator[Callable[[], np.ndarray]]:
        if self._codes and self._codes.takes(part):
            yield from self._codes.tasks(part)
            return
        if self._feedback and self._is_fed(part):
            yield from self._feedback.tasks(part)
            return
        for _, read in self._sources[part.name].blocks(self._folder.checkpoint):
            yield partial(_encoded, part, read)

    def verify(self, target: Path) -> None:
        """Read back every tensor, with the source's beside it.

        Raises `ArtifactError` for a part that is not what was written, by its digest, or not what the source says
        within what its type may lose.
        """
        packed = PackedModel.open(target)
        with open_packed(target) as file:
            digests = file.digests or {}
        with self._progress("verify", self.nbytes, "byte") as advance, coders() as threads:
            for part in self._parts:
                if digest_of(self._read_back(packed, part, threads)) != digests.get(part.name):
                    raise _not_as_written(part)
                advance(part.nbytes)

    def _read_back(self, packed: PackedModel, part: Part, threads: ThreadPoolExecutor) -> Iterator[memoryview]:
        """The stored bytes of `part`, once each block was held against the source."""
        if part.name == "order":
            yield packed.stored("order").data
            return
        name = split_name(part.name)[1]
        for stored, is_right, lost in in_order(self._checks(packed, part), threads):
            if not is_right:
                raise _not_as_written(part)
            self._lost[name] = self._lost.get(name, np.zeros(2)) + lost
            yield stored.data
            packed.release()

    def _checks(self, packed: PackedModel, part: Part) -> Iterator[Callable[[], _Check]]:
        start = 0
        for count, read in self._sources[part.name].blocks(self._folder.checkpoint):
            stored = packed.stored(part.name)[start : start + count]
            yield partial(self._checked, part, stored, read)
            start += count

    def _checked(self, part: Part, stored: np.ndarray, read: Callable[[], np.ndarray]) -> _Check:
        """What was stored of a block, whether that is the block within what its type may lose, and what was lost."""
        block = read()
        if part.dtype in FORMATS:
            wide = dequantize(stored, part.shape[1])
            lost = np.array([np.square(wide - block).sum(dtype=np.float64), np.square(block).sum(dtype=np.float64)])
            return stored, within_bounds(wide, block, FORMATS[part.dtype], self._is_fed(part)), lost
        return stored, np.array_equal(stored, encode(part, block)), np.zeros(2)


def _advancing(blocks: Iterable[np.ndarray], advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block
        advance(block.nbytes)


def _not_as_written(part: Part) -> ArtifactError:
    return ArtifactError(f"'{part.name}' did not read back as written; check the disk and pack again")


def _encoded(part: Part, read: Callable[[], np.ndarray]) -> np.ndarray:
    return encode(part, read())


def encode(part: Part, block: np.ndarray) -> np.ndarray:
    """`block` f32 as the file stores it, by plain rounding. Raises `ValueError` for what the type cannot hold."""
    if part.dtype == "int8" or part.dtype == "int4":
        return quantize(block, part.dtype)
    stored = _narrow(block, part.dtype)
    if not np.isfinite(widen_ref(stored)).all():
        raise ValueError(f"{part.dtype} cannot hold all of them, the largest is {np.abs(block).max():.3g}")
    return stored


def _narrow(block: np.ndarray, dtype: str) -> np.ndarray:
    """f32 rounded to the nearest of `dtype`, as kernels see it; too large a weight becomes infinite.

    In NumPy, because torch's threads and ours would wait for each other.
    """
    if dtype == "bf16":
        bits = np.ascontiguousarray(block).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return block.astype(np.float16).view(np.int16)
    if dtype == "f32":
        return block
    raise ValueError(f"{dtype} is not a type of floats")
