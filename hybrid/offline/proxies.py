"""The proxies of a model whose activation is never 0: made, kept and used by the calls that predictors have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hybrid.errors import ArtifactError, CorpusError, InputError
from hybrid.formats.folder import require_writable
from hybrid.offline.evaluate import perplexity
from hybrid.offline.project import Project, check_seed
from predictor.proxy import ProxyBank, proxy_form
from predictor.proxy_fit import ProxyFit
from predictor.row_copies import CopiedPart, LayerCopies, RowCopies, write_copies
from predictor.target import PredictorTarget
from profiler.common.artifact import ArtifactHeader, atomic_write
from profiler.common.openmp import torch_threads
from profiler.common.progress import Progress
from profiler.common.spec import Strategy
from profiler.corpus import TokenWindows
from profiler.profile import NeuronProfile


class Proxies:
    """What `Project` is for predictors."""

    strategy: Strategy = "proxy"

    def __init__(self, project: Project, progress: Progress) -> None:
        self._project, self._progress = project, progress

    def train(self, found: NeuronProfile, target: PredictorTarget, seed: int) -> ProxyBank:
        """Copy rows, unless that is done, set thresholds, count who passes them, write and return all of it.

        Raises `InputError` for rows as short as their copies, `CorpusError` for a profile without text to measure
        perplexity on.
        """
        project = self._project
        if not project.spec.proxied:
            raise InputError("rows of int4 are no longer than copies in 4 bits: proxies win nothing; run it dense")
        project.require_source()
        require_writable(project.bundle.path)
        check_seed(seed)
        if not len(found.validation):
            raise CorpusError("the profile keeps no text to set thresholds on; run hybrid profile with more text")
        project.folder.check_finite()
        layers = [project.ffn_weights(layer) for layer in range(project.spec.n_layers)]
        with torch_threads(project.runtime.pool.threads):
            fit = ProxyFit.of(project.spec, self.copies(), layers, found.inputs, seed, self._progress)
            share, increase = fit.search(target, lambda bank: self._perplexity(found, bank), self._progress)
            bank = fit.finished(share, increase, target, self._progress)
        self.write(bank, found.header, target, seed)
        return self.load_predictors()

    def write(self, bank: ProxyBank, profile: ArtifactHeader, target: PredictorTarget, seed: int) -> None:
        """Keep thresholds that were set on a profile; the copies are there."""
        project = self._project
        assert bank.report is not None
        with atomic_write(project.bundle.report) as file:
            file.write(bank.report.to_json().encode())
        bank.save(project.bundle.proxy, project.spec, project.train_origin(profile, target, seed))

    def current_predictors(self, profile: ArtifactHeader, target: PredictorTarget, seed: int) -> ArtifactHeader | None:
        """The header of the stored thresholds if training now would make the same again."""
        try:
            header = self.load_predictors().header
        except ArtifactError:
            return None
        wanted = self._project.train_origin(profile, target, seed)
        fits = header and all(header.made_from.get(name) == value for name, value in wanted.items())
        return header if fits else None

    def load_predictors(self) -> ProxyBank:
        return self._project.bundle.load_proxies(self._project.spec)

    def use_predictors(self, bank: ProxyBank | None) -> None:
        """Make the model's `proxy` strategy use `bank`, or have none."""
        self._project.folder.use_proxies(self._project.model.ffns, bank, None)

    def copies(self) -> RowCopies:
        """The stored copies, made first where they are missing or of another model."""
        project, form = self._project, proxy_form(self._project.spec)
        spec, path = project.spec, project.bundle.copies
        try:
            return RowCopies.load(path, spec, form, project.bundle.repair)
        except ArtifactError:
            with self._progress("copies", spec.n_layers, "layer") as advance:
                write_copies(path, spec, form, {"blocks": form.blocks}, self._layers(), advance)
        return RowCopies.load(path, spec, form, project.bundle.repair)

    def _layers(self) -> Iterator[LayerCopies]:
        for layer in range(self._project.spec.n_layers):
            weights = self._project.ffn_weights(layer).float()
            parts: dict[CopiedPart, np.ndarray] = {"up": weights.up.contiguous().numpy()}
            if weights.gate is not None:
                parts["gate"] = weights.gate.contiguous().numpy()
            yield proxy_form(self._project.spec).layer(parts, self._project.runtime.pool.threads)

    def _perplexity(self, found: NeuronProfile, bank: ProxyBank | None) -> float:
        """On the profile's validation windows, with `bank` as decode would use it; None is dense."""
        windows = TokenWindows(found.validation.astype(np.int64), np.zeros_like(found.validation))
        self.use_predictors(bank)
        return perplexity(self._project.model, self._project.runtime, "proxy" if bank else "dense", windows)


def maker_of(project: Project, progress: Progress) -> Project | Proxies:
    """What makes, keeps and uses that by which the neurons of the project's model are named."""
    return project if project.spec.fires_sparsely else Proxies(project, progress)
