"""Which GPU an engine uses, and the placement that it runs by within a VRAM budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hybrid.errors import BudgetError
from hybrid.formats.bundle import Bundle
from hybrid.formats.packed import PackedModel
from hybrid.model.loader import ModelFolder
from placement.placement import Placement, PlacementSettings, place, predictor_sizes
from placement.plan import UNLIMITED
from profiler.common.hardware import HardwareProfile
from profiler.common.spec import Strategy

# Left free on the GPU where no budget is given: for what other programs, and drivers, take meanwhile.
RESERVE_BYTES = 2**30
_SOLVE_SECONDS = 2.0  # of a start, at most, for a placement


def gpu_of(budget: int | None) -> torch.device | None:
    """The first GPU; None where there is none, or none may be used. Raises `BudgetError` for a budget without a GPU."""
    if budget == 0 or not torch.cuda.is_available():
        if budget not in (None, 0, UNLIMITED):
            problem = "there is no GPU here that torch can use; leave the VRAM budget out, or give 0"
            raise BudgetError(problem, setting="vram_budget")
        return None
    return torch.device("cuda", 0)


def free_bytes(gpu: torch.device) -> int:
    """What an engine may take of `gpu` at most, `RESERVE_BYTES` left."""
    free, _ = torch.cuda.mem_get_info(gpu)
    return max(0, free - RESERVE_BYTES)


def taken_bytes(gpu: torch.device, free_before: int) -> int:
    """Bytes of `gpu` taken since `free_before` of them were free; other programs' too, where one runs beside."""
    return free_before - torch.cuda.mem_get_info(gpu)[0]


def placement_for(
    bundle: Bundle,
    folder: ModelFolder,
    strategy: Strategy,
    context: int,
    gpu: torch.device | None,
    budget: int | None,
    notices: list[str],
    kv_tokens: int | None = None,
) -> Placement:
    """The stored placement, or one within what the GPU and `budget` allow, solved now from the stored profile.

    Models without a profile have no order of neurons; whole layers go to the GPU as they fit. `notices` get what is to
    be known.
    """
    sparse = folder.spec.fires_sparsely or strategy == "proxy"
    stored = _stored(bundle, folder, strategy, notices) if gpu is None or sparse else None
    if gpu is None:
        return stored or Placement.all_cold(folder.spec)
    if stored is None and sparse:
        notices.append("no placement yet (`hybrid place` makes one): all neurons are cold, and no GPU is used")
        return Placement.all_cold(folder.spec)
    most = free_bytes(gpu)
    if budget is not None and most < budget < UNLIMITED:
        raise BudgetError(
            f"VRAM budget is {budget / 2**30:.2f} GiB, the GPU has {most / 2**30:.2f} GiB free beside a reserve of 1; "
            "lower the VRAM budget",
            setting="vram_budget",
        )
    if _measured(bundle) is None:
        notices.append(f"placed for a default GPU: `hybrid hardware -o {bundle.hardware}` measures this one")
    made = {} if stored is None else stored.made_from
    wanted = int(made.get("vram_budget", UNLIMITED)) if budget is None else budget
    now = {"vram_budget": wanted, "context": context, "kv_tokens": kv_tokens}
    fits = folder.spec.kv == "auto" and wanted <= most  # a stored one is for keys and values as they are by default
    fits = fits and all(made.get(name) == value for name, value in now.items())
    copied = ("certified", "proxy")  # copies take of the budget
    fits = fits and (strategy in copied) == (made.get("strategy") in copied)
    if stored is not None and fits and _knew(made.get("hardware_profile"), hardware_of(bundle).to_json()):
        return stored
    return solve_within(bundle, folder, strategy, context, min(wanted, most), kv_tokens)


def _knew(then: object, now: dict[str, Any]) -> bool:
    """Whether a placement's hardware profile is this one, as far as it went: later versions measure more."""
    return isinstance(then, dict) and bool(then) and all(now.get(name) == value for name, value in then.items())


def hardware_of(bundle: Bundle) -> HardwareProfile:
    """The bundle's hardware profile of a machine with a GPU, or the default one where it has none."""
    return _measured(bundle) or HardwareProfile.load()


def _measured(bundle: Bundle) -> HardwareProfile | None:
    """None also for a profile of before the machine had a GPU."""
    stored = HardwareProfile.load(bundle.hardware) if bundle.hardware.is_file() else None
    return stored if stored is not None and stored.has_gpu else None


def solve_within(
    bundle: Bundle, folder: ModelFolder, strategy: Strategy, context: int, budget: int, kv_tokens: int | None = None
) -> Placement:
    """The placement of a model for `budget` bytes on this machine, by its stored profile."""
    spec = folder.spec
    hardware = hardware_of(bundle)
    hardware = replace(hardware, vram_bytes=max(budget, hardware.vram_bytes))
    settings = PlacementSettings(budget, context, strategy, time_limit=_SOLVE_SECONDS, kv_tokens=kv_tokens)
    if strategy == "proxy":
        proxies = bundle.load_proxies(spec)
        made = {"predictors": None if proxies.header is None else proxies.header.key}
        sizes = predictor_sizes(spec, proxies)
        return _in_packed_order(folder, place(spec, hardware, proxies.frequency(), sizes, settings, made).placement)
    if not spec.fires_sparsely:
        return place(spec, hardware, np.ones((spec.n_layers, spec.d_ff)), (0,) * spec.n_layers, settings, {}).placement
    profile = bundle.load_profile(spec, samples=False)
    bank = bundle.load_predictors(spec) if strategy == "learned" else None
    settings, sizes = settings.with_predictors(bank), predictor_sizes(spec, bank)
    if strategy == "certified":
        settings = settings.with_certificates(bundle.copies_header(spec).made_from)
    found = place(spec, hardware, profile.frequency(), sizes, settings, {"profile": profile.header.key}).placement
    return _in_packed_order(folder, found)


def _in_packed_order(folder: ModelFolder, found: Placement) -> Placement:
    """The order of a packed folder's rows is fixed, and was made from the same profile."""
    return replace(found, order=folder.weights.order) if isinstance(folder.weights, PackedModel) else found


def _stored(bundle: Bundle, folder: ModelFolder, strategy: Strategy, notices: list[str]) -> Placement | None:
    """The bundle's placement; `learned` and `proxy` need one, the others run all-cold without."""
    if strategy in ("learned", "proxy") or bundle.placement.is_file():
        notices += bundle.stale(folder.spec)
        return bundle.load_placement(folder.spec)
    return None
