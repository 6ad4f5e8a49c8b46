"""`RunPlan`: how a model will be run on this machine, chosen in one place before anything is built.

`Engine` builds what the plan says; the chat's banner and `hybrid doctor` print it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpu_kernels.contract import Precision
from cpu_kernels.worker_pool import available_cpus
from hybrid.console import counted, percent
from hybrid.errors import ArtifactError, InputError
from hybrid.formats.bundle import Bundle
from hybrid.formats.packed_predictors import PREDICTORS_FILE
from hybrid.model.kv_cache import check_context
from hybrid.model.loader import ModelFolder
from hybrid.model.powerinfer_import import import_artefacts
from hybrid.runtime.config import EngineConfig
from hybrid.runtime.devices import gpu_of, placement_for
from placement.placement import Placement
from predictor.bank import PredictorBank
from profiler.common.spec import STRATEGIES, ModelSpec, Strategy


@dataclass(frozen=True, eq=False)
class RunPlan:
    """What an engine will be built from.

    gpu: None where everything runs on the CPU. bank: the predictors, None where none are used or a packed model brings
    its own. threads: of the CPU. context: tokens that a sequence may have. notices: what a user should know. kv_tokens:
    that the KV cache has room for, where more or less than one context was asked for. prefill: of a prompt's products.
    """

    folder: ModelFolder
    bundle: Bundle
    strategy: Strategy
    gpu: torch.device | None
    placement: Placement
    bank: PredictorBank | None
    threads: int
    context: int
    notices: tuple[str, ...] = ()
    kv_tokens: int | None = None
    prefill: Precision = "fast"

    @property
    def spec(self) -> ModelSpec:
        return self.folder.spec

    @property
    def where(self) -> str:
        """Which devices compute: `CPU, 2 threads`, or how many neurons and layers the GPU has beside it."""
        threads = counted(self.threads, "thread")
        if self.gpu is None:
            return f"CPU, {threads}"
        hot = percent(float(self.placement.hot.sum()) / (self.spec.n_layers * self.spec.d_ff))
        layers = int(self.placement.layer_on_gpu.sum())
        of_layers = "" if layers == self.spec.n_layers else f" of {layers} of {counted(self.spec.n_layers, 'layer')}"
        return f"GPU with {hot} of neurons hot{of_layers}, CPU with {threads}"

    def summary(self) -> str:
        """One line: strategy, devices and context."""
        return f"{self.strategy}; {self.where}; context {self.context}"


def plan_run(
    folder: ModelFolder,
    config: EngineConfig | None = None,
    placement: Placement | None = None,
    bank: PredictorBank | None = None,
    device: torch.device | None = None,
) -> RunPlan:
    """Choose strategy, device, placement, threads and context; `placement` and `bank` stand in for the stored ones.

    device: where the placement's GPU part goes, by default the first GPU, if there is one. Raises an `InputError` of
    some kind when an artefact or the configuration cannot be used.
    """
    config = config or EngineConfig()
    folder = folder.with_kv(config.kv)
    spec = folder.spec
    context = check_context(spec, config.context)
    bundle = Bundle.of(folder.path, spec, config.bundle)
    notices = [*folder.notices, *import_artefacts(folder, bundle)]
    strategy = _strategy(folder, bundle, config.sparsity, placement, bank, notices)
    if strategy == "learned" and bank is None and not folder.is_packed:
        bank = _predictors(bundle, spec)
    if strategy == "certified":
        _require_copies(bundle, spec)
    if strategy == "proxy":
        _require_proxies(bundle)
    gpu = device or gpu_of(config.vram_budget)
    if placement is None:
        sizes = config.vram_budget, notices, config.kv_tokens
        placement = placement_for(bundle, folder, strategy, context, gpu, *sizes)
    gpu = gpu if placement.choice.uses_gpu else None
    threads = config.threads or cpu_threads(gpu is not None)
    found = folder, bundle, strategy, gpu, placement, bank, threads, context, tuple(notices)
    return RunPlan(*found, config.kv_tokens, "fast" if config.prefill == "auto" else config.prefill)


def cpu_threads(beside_gpu: bool) -> int:
    """All CPUs, but beside a GPU leave one in eight, at least one: for the caller, which waits for the GPU, and others.

    On 16 cores 14 threads took 6.47 ms a token, 15 took 6.62, 12 6.50 and 10 6.96 (7B bf16, 8 GiB).
    """
    cpus = available_cpus()
    return max(1, cpus - max(1, cpus // 8)) if beside_gpu else cpus


def _strategy(
    folder: ModelFolder,
    bundle: Bundle,
    sparsity: str,
    placement: Placement | None,
    bank: PredictorBank | None,
    notices: list[str],
) -> Strategy:
    """The strategy that `sparsity` means here. Raises `InputError` for a sparse one where nothing is sparse."""
    spec = folder.spec
    for strategy in STRATEGIES:
        if strategy == sparsity:
            if strategy not in ("dense", "proxy") and not spec.fires_sparsely:
                problem = f"{spec.activation} fires densely, so sparsity {sparsity} has no meaning; use proxy or dense"
                raise InputError(problem, setting="sparsity")
            if strategy == "proxy" and spec.fires_sparsely:
                problem = f"sparsity proxy is for models whose activation is never 0, this one's is {spec.activation}"
                raise InputError(f"{problem}; use certified, learned or exact", setting="sparsity")
            if strategy == "certified" and not spec.certifiable:
                # Nothing is lost either way, and a copy would only be read beside rows that are no longer.
                notices.append(f"rows of {spec.dtype} are no longer than a copy in 8 bits, so certified is exact here")
                return "exact"
            return strategy
    if not spec.fires_sparsely:
        placed = placement is not None or bundle.placement.is_file()
        if bundle.proxy.is_file() and placed and spec.proxied:
            return "proxy"
        fewer = f"fewer after: {bundle.repair}" if spec.proxied else "copies of int4 rows would be as long as the rows"
        notices.append(f"{spec.activation} fires densely: every neuron is computed; {fewer}")
        return "dense"
    copied = spec.certifiable and bundle.copies.is_file()
    if copied and _placed_for(bundle, spec, placement) == "certified":
        return "certified"
    stored = folder.path / PREDICTORS_FILE if folder.is_packed else bundle.predictors
    placed = placement is not None or bundle.placement.is_file()
    if placed and (bank is not None or stored.is_file()):
        return "learned"
    if copied:
        return "certified"
    notices.append(f"not prepared, so exact: every gate is computed, nothing is lost; faster after: {bundle.repair}")
    return "exact"


def _placed_for(bundle: Bundle, spec: ModelSpec, placement: Placement | None) -> object:
    """The strategy that the placement was solved for; None where there is none."""
    if placement is None and bundle.placement.is_file():
        placement = bundle.load_placement(spec)
    return None if placement is None else placement.made_from.get("strategy")


def _require_copies(bundle: Bundle, spec: ModelSpec) -> None:
    if not bundle.copies.is_file():
        raise ArtifactError(
            f"{bundle.copies} is missing; make it with: {bundle.certify}; or use sparsity exact, which needs none"
        )
    bundle.copies_header(spec)


def _require_proxies(bundle: Bundle) -> None:
    if not bundle.proxy.is_file():
        raise ArtifactError(
            f"{bundle.proxy} is missing; make it with: {bundle.repair}; or use sparsity dense, which needs none"
        )


def _predictors(bundle: Bundle, spec: ModelSpec) -> PredictorBank:
    if not bundle.predictors.is_file():
        raise ArtifactError(
            f"{bundle.predictors} is missing; make it with: {bundle.repair}; or use sparsity exact, which needs none"
        )
    return bundle.load_predictors(spec)
