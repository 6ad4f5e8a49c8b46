"""The offline steps over one model: profile, train, place. Each writes its own artefact and nothing else.

A step's result is current when its artefact says that it was made from what would be used now; `prepare` then skips it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpu_kernels.worker_pool import WorkerPool
from hybrid.console import counted
from hybrid.errors import ContextError, InputError, ModelError
from hybrid.formats.bundle import Bundle
from hybrid.formats.folder import require_writable
from hybrid.formats.packed import PackedModel
from hybrid.formats.text import TextCodec
from hybrid.model.ffn import FFNRuntime
from hybrid.model.loader import ModelFolder
from hybrid.model.powerinfer_import import import_artefacts
from hybrid.model.transformer import Transformer
from hybrid.offline.evaluate import perplexity
from hybrid.offline.own_text import Writer, own_windows
from placement import placement as placement_file
from placement.placement import Placement, PlacementResult, PlacementSettings, place, predictor_sizes
from predictor import bank as predictor_bank
from predictor.bank import PredictorBank
from predictor.partial import TrainingState
from predictor.proxy import ProxyBank
from predictor.samples import FFNWeights
from predictor.target import PredictorTarget
from predictor.train import train_predictors
from profiler import profile as neuron_profile
from profiler.common.artifact import ArtifactHeader, atomic_write
from profiler.common.hardware import HardwareProfile
from profiler.common.openmp import torch_threads
from profiler.common.progress import Progress, no_progress
from profiler.common.spec import Strategy
from profiler.corpus import TokenWindows, corpus_files, corpus_hash, read_documents, token_windows
from profiler.documents import Bad, Document
from profiler.profile import NeuronProfile
from profiler.recorder import SAMPLE_TOKENS, ActivationRecorder, ProfileSettings, record_profile

_LONG_READ = 64 << 20  # bytes of a corpus from which on reading it is worth a bar


def check_seed(seed: int) -> None:
    """Raise `InputError` for a seed that not every generator in use takes."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}, expected 0 to {2**32 - 1}")


@dataclass(frozen=True)
class ProfileRequest:
    """What to profile over: the corpus, how many tokens of it, in windows of how many; checked when built.

    skip_bad: leave out and count documents that cannot be used, where the first would else be an error.
    own_text: beside the corpus, so many tokens that the model continues itself.
    """

    corpus: tuple[Path, ...]
    tokens: int = 100_000
    window: int = 512
    seed: int = 0
    skip_bad: bool = False
    own_text: int = 0

    def __post_init__(self) -> None:
        if not self.corpus:
            raise InputError("no corpus given; name text files with --corpus FILE...")
        if self.window < 2:
            raise InputError(f"a calibration window has {self.window} tokens, expected at least 2")
        if self.tokens < self.window:
            raise InputError(f"--tokens {self.tokens} is less than one window of {self.window} tokens; raise it")
        if not 0 <= self.own_text <= self.tokens // 2:
            raise InputError(
                f"--own-text {self.own_text} is more than half of --tokens {self.tokens}, those of the corpus; lower it"
            )
        check_seed(self.seed)

    @property
    def settings(self) -> ProfileSettings:
        """What to keep of it; inputs of own text come on top, as predictors get better with more of them."""
        return ProfileSettings(SAMPLE_TOKENS + self.own_text, seed=self.seed)


class Project:
    """One model folder with its bundle, and the steps that fill the bundle."""

    strategy: Strategy = "learned"  # of what it trains

    def __init__(
        self,
        model: Path,
        bundle: Path | None,
        threads: int | None,
        progress: Progress,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`say` is told what a corpus holds. Raises `ModelError` when the folder is not a model that can be loaded."""
        self.folder = ModelFolder.open(model)
        self.spec = self.folder.spec
        self.bundle = Bundle.of(self.folder.path, self.spec, bundle)
        self._threads, self._progress, self._say = threads, progress, say
        for line in import_artefacts(self.folder, self.bundle):
            say(f"note: {line}")

    @property
    def codec(self) -> TextCodec:
        return self.folder.codec

    @cached_property
    def runtime(self) -> FFNRuntime:
        return FFNRuntime("dense", WorkerPool(self._threads), self.spec.d_model, self.spec.d_ff)

    @cached_property
    def model(self) -> Transformer:
        """The model with every neuron in the checkpoint's order and no predictors: dense. Raises as `check_finite`."""
        self.folder.check_finite()
        return self.folder.build(self.runtime, None, None, self.bundle)

    def encode(self, document: Document, most: int) -> list[int]:
        """The first token ids of a corpus document, at most so many, as the model meets such text."""
        if document.messages:
            tokens = self.codec.encode_chat(document.messages, add_generation_prompt=False, enough=most)
            return (tokens + self.codec.eos_tokens())[:most]
        return self.codec.encode_document(document.text, enough=most)[:most]

    def windows(self, request: ProfileRequest) -> TokenWindows:
        """The token windows of `request`. Raises `CorpusError` or `ContextError`."""
        self.check_context(request.window)

        def documents(bad: Bad) -> Iterator[Document]:
            with self._read_bar(request.corpus) as advance:
                yield from read_documents(request.corpus, bad, advance)

        found = token_windows(documents, self.encode, request.window, request.tokens, request.seed, request.skip_bad)
        for line in corpus_summary(found, request.tokens):
            self._say(line)
        return found

    def _read_bar(self, corpus: tuple[Path, ...]) -> AbstractContextManager[Callable[[int], None]]:
        """A bar over the bytes of a corpus that takes a while to read, none for others."""
        nbytes = sum(path.stat().st_size for path in corpus_files(corpus))
        return (self._progress if nbytes >= _LONG_READ else no_progress)("corpus", nbytes, "byte")

    def use_predictors(self, bank: PredictorBank | None) -> None:
        """Make the model's `learned` strategy use `bank`, or have none."""
        packed = self.folder.weights if isinstance(self.folder.weights, PackedModel) else None
        for layer, ffn in enumerate(self.model.ffns):
            predictor = bank.predictors[layer] if bank else None
            if predictor and packed:  # its rows lie in the order of a placement
                predictor = predictor.reordered(torch.from_numpy(packed.order[layer].astype(np.int64)))
            ffn.set_predictor(predictor)

    def check_context(self, context: int) -> None:
        """Raise `ContextError` unless the model takes `context` tokens."""
        if not 1 <= context <= self.spec.max_context:
            raise ContextError(
                f"context {context} is out of range: this model takes 1 to {self.spec.max_context} tokens"
            )

    def require_sparse(self) -> None:
        """Raise `InputError` unless neurons of this model fire sparsely."""
        if not self.spec.fires_sparsely:
            raise InputError(self.why_dense())

    def why_dense(self) -> str:
        """Why there is no such thing for a model whose neurons all fire, and what there is instead."""
        return (
            f"{self.spec.activation} fires densely: no neuron is ever 0, so there is nothing to predict or to certify; "
            f"neurons that add little can be left out, by proxies: {self.bundle.repair}"
        )

    def require_strategy(self, strategy: Strategy) -> None:
        """Raise `InputError` for a sparse strategy that this model has nothing for."""
        if strategy != "proxy":
            self.require_sparse()
        elif self.spec.fires_sparsely:
            raise InputError(
                f"proxies are for models whose activation is never 0, this one's is {self.spec.activation}; "
                "use certified, learned or exact"
            )

    def require_source(self) -> None:
        """Raise `InputError` for a packed model: its neurons have another order, its weights another type."""
        if isinstance(self.folder.weights, PackedModel):
            raise InputError(f"{self.folder.path} is packed; profile and train the model that it was packed from")

    # Profile

    def profile_origin(self, request: ProfileRequest) -> dict[str, Any]:
        """What a profile made by `request` says of its making."""
        settings = request.settings
        with self._read_bar(request.corpus) as advance:
            digest = corpus_hash(request.corpus, advance)
        return {
            "corpus": digest,
            "corpus_files": [path.name for path in corpus_files(request.corpus)],
            "tokens": request.tokens,
            "window": request.window,
            "seed": request.seed,
            "sample_tokens": settings.sample_tokens,
            "own_text": request.own_text or None,  # which profiles of before it do not say
        }

    def profile(self, request: ProfileRequest, write: Writer | None = None) -> NeuronProfile:
        """Run the model over the corpus, and write and return the profile; `write` makes what text of its own is asked
        for."""
        self.require_source()
        require_writable(self.bundle.path)
        header = NeuronProfile.make_header(self.spec, self.profile_origin(request))
        windows = self.windows(request)
        if request.own_text and write is not None:
            windows = self._with_own_text(windows, request, header, write)
        ffns = self.model.ffns
        recorder = ActivationRecorder(self.spec, ffns, [ffn.act for ffn in ffns])
        settings = request.settings
        kept = self.bundle.partial_profile
        with torch_threads(1):
            found = record_profile(self._run_dense, recorder, windows, settings, header, kept, self._progress)
        found.save(self.bundle.profile)
        kept.unlink(missing_ok=True)
        self.bundle.partial_own_text.unlink(missing_ok=True)
        return found

    def _with_own_text(
        self, windows: TokenWindows, request: ProfileRequest, header: ArtifactHeader, write: Writer
    ) -> TokenWindows:
        """`windows`, whose last are those that quality is measured on, and before them the model's own."""
        self._run_dense(torch.from_numpy(windows.tokens[0]))  # a model that is damaged is said to be, first
        count, kept = min(request.own_text // request.window, windows.count // 2), self.bundle.partial_own_text
        own = own_windows(windows, count, write, request.seed, kept, header, self._progress)
        tokens, documents = [own.tokens, windows.tokens], [own.documents, windows.documents]
        return TokenWindows(np.concatenate(tokens), np.concatenate(documents))

    def _run_dense(self, tokens: torch.Tensor) -> object:
        self.runtime.as_decode, self.runtime.keep_fired = False, True
        hidden = self.model(tokens)
        if not hidden.isfinite().all():
            raise ModelError(f"{self.folder.path} computes infinite numbers or NaN; its weights may be damaged")
        return hidden

    def current_profile(self, request: ProfileRequest) -> ArtifactHeader | None:
        """The header of the stored profile if `request` would make the same again."""
        return self._current(self.bundle.profile, neuron_profile.KIND, self.profile_origin(request))

    def load_profile(self, samples: bool = True) -> NeuronProfile:
        """The stored profile, or without `samples` only its counts. Raises `ArtifactError`."""
        return self.bundle.load_profile(self.spec, samples)

    # Train

    def train_origin(self, profile: ArtifactHeader, target: PredictorTarget, seed: int) -> dict[str, Any]:
        """What predictors trained on a profile say of their making."""
        return {"profile": profile.key, "target": asdict(target), "seed": seed}

    def train(self, found: NeuronProfile, target: PredictorTarget, seed: int) -> PredictorBank:
        """Train, write and return predictors; their report is with them. Goes on where an interrupted call ended."""
        self.require_source()
        self.require_sparse()
        require_writable(self.bundle.path)
        check_seed(seed)
        self.folder.check_finite()
        layers = [self.ffn_weights(layer) for layer in range(self.spec.n_layers)]
        kept, origin = self.bundle.partial_predictors, self.train_origin(found.header, target, seed)
        with torch_threads(self.runtime.pool.threads):
            bank, report = train_predictors(
                self.spec,
                layers,
                found.inputs,
                found.documents,
                target,
                seed=seed,
                perplexity_of=(lambda bank: self.validation_perplexity(found, bank)) if len(found.validation) else None,
                state=TrainingState.of(kept, self.spec, origin),
                progress=self._progress,
            )
        with atomic_write(self.bundle.report) as file:
            file.write(report.to_json().encode())
        bank.save(self.bundle.predictors, self.spec, origin, report)
        kept.unlink(missing_ok=True)
        return self.load_predictors()

    def current_predictors(self, profile: ArtifactHeader, target: PredictorTarget, seed: int) -> ArtifactHeader | None:
        """The header of the stored predictors if training now would make the same again."""
        return self._current(self.bundle.predictors, predictor_bank.KIND, self.train_origin(profile, target, seed))

    def load_predictors(self) -> PredictorBank:
        return self.bundle.load_predictors(self.spec)

    def ffn_weights(self, layer: int) -> FFNWeights:
        """One layer's FFN as predictors learn from it, in its stored type."""
        t = self.folder.ffn_tensors(layer)
        return FFNWeights(t.gate, t.up, t.down, self.spec.activation, t.gate_bias, t.up_bias)

    def validation_perplexity(self, found: NeuronProfile, bank: PredictorBank | None) -> float:
        """Perplexity on the profile's validation windows, with `bank` as decode would use it; None is dense."""
        windows = TokenWindows(found.validation.astype(np.int64), np.zeros_like(found.validation))
        self.use_predictors(bank)
        return perplexity(self.model, self.runtime, "learned" if bank else "dense", windows)

    # Place

    def place_origin(
        self, profile: ArtifactHeader, predictors: ArtifactHeader | None, hardware: HardwareProfile
    ) -> dict[str, Any]:
        """What a placement says of its making, beside its settings and its prediction."""
        return {
            "profile": profile.key,
            "predictors": predictors.key if predictors else None,
            "hardware_profile": hardware.to_json(),
        }

    def place(
        self,
        found: NeuronProfile,
        bank: PredictorBank | ProxyBank | None,
        hardware: HardwareProfile,
        settings: PlacementSettings,
    ) -> PlacementResult:
        """Solve the placement; `write_placement` keeps it."""
        settings, sizes = settings.with_predictors(bank), predictor_sizes(self.spec, bank)
        if settings.strategy == "certified" and self.bundle.has_copies(self.spec):
            settings = settings.with_certificates(self.bundle.copies_header(self.spec).made_from)
        origin = self.place_origin(found.header, bank.header if bank else None, hardware)
        firing = bank.frequency() if isinstance(bank, ProxyBank) else found.frequency()
        return place(self.spec, hardware, firing, sizes, settings, origin)

    def write_placement(self, placement: Placement) -> None:
        placement.save(self.bundle.placement)

    def placement_is_current(self, origin: dict[str, Any], settings: PlacementSettings) -> bool:
        """Whether solving now, from `origin` with `settings`, would make the stored placement again."""
        wanted = origin | {
            "vram_budget": settings.vram_budget,
            "context": settings.context,
            "strategy": settings.strategy,
            "solver": settings.solver,
        }
        return self._current(self.bundle.placement, placement_file.KIND, wanted) is not None

    def _current(self, path: Path, kind: str, wanted: dict[str, Any]) -> ArtifactHeader | None:
        """The header of the artefact at `path` if it is whole, of this model, and was made from what is `wanted`."""
        header = self.bundle.current(path, kind, self.spec)
        fits = header and all(header.made_from.get(name) == value for name, value in wanted.items())
        return header if fits else None


def corpus_summary(found: TokenWindows, asked: int) -> list[str]:
    """What windows were made of, and what is not as it was asked: a corpus that is too short, documents left out."""
    use, window = found.use, found.tokens.shape[1]
    if use is None:
        return []
    lines = [f"corpus: {found.tokens.size:,} tokens of {use.used:,} of {use.documents:,} documents"]
    if found.tokens.size <= asked - window:
        lines.append(f"note: that is all it has in whole windows of {window}; {asked:,} tokens were asked for")
    if use.skipped:
        lines.append(f"note: unusable and left out: {counted(use.skipped, 'document')}, the first: {use.first_skipped}")
    return lines
