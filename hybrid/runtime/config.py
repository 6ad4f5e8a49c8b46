"""`EngineConfig`: what a caller asks of an engine, checked when built. `plan_run` makes a plan of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cpu_kernels.worker_pool import available_cpus
from hybrid.errors import BudgetError, ContextError, InputError
from placement.plan import UNLIMITED, parse_size
from profiler.common.spec import KV_CHOICES, STRATEGIES, KVChoice

PrefillChoice = Literal["auto", "fast", "precise"]
PREFILL_CHOICES: tuple[PrefillChoice, ...] = get_args(PrefillChoice)
MOST_THREADS = 1024
MOST_KV_TOKENS = 2**32


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model; checked when built.

    sparsity: a strategy, or `auto`: where the activation fires sparsely `certified` if the placement is made for it or
    there are copies of rows and no predictors, `learned` if those are there, `exact` if neither is; elsewhere `proxy`
    if proxies are there and placed, or `dense`. context: tokens that the KV cache holds, by default the model's.
    threads: CPU threads, by default all available, beside a GPU all but one in eight. bundle: the folder of the
    artefacts, by default the model's own. vram_budget: bytes that may be taken from the GPU, as a number or a text such
    as 8GiB, 0 for none; by default what the stored placement was made for, at most what is free. kv_tokens: tokens that
    sequences which share a KV pool have together, by default as many as the context has. kv: how keys and values are
    kept, int8 or `auto`, in f16 or, where that does not hold them, f32. prefill: how the tokens of a prompt are
    multiplied, `fast`, which is `auto`, in 11 to 22 bits, or `precise`, in f32.
    """

    sparsity: str = "auto"
    context: int | None = None
    threads: int | None = None
    bundle: Path | None = None
    vram_budget: int | None = None
    kv_tokens: int | None = None
    kv: KVChoice = "auto"
    prefill: PrefillChoice = "auto"

    def __post_init__(self) -> None:
        if self.sparsity not in ("auto", *STRATEGIES):
            expected = f"expected auto, {', '.join(STRATEGIES)}"
            raise InputError(f"unknown sparsity {self.sparsity!r}, {expected}", setting="sparsity")
        if self.context is not None and not (_is_whole(self.context) and self.context >= 1):
            expected = "expected a whole number of tokens, at least 1"
            raise ContextError(f"context is {self.context!r}, {expected}", setting="context")
        if self.threads is not None and not (_is_whole(self.threads) and 1 <= self.threads <= MOST_THREADS):
            expected = f"expected a whole number, 1 to {MOST_THREADS}; this machine offers {available_cpus()}"
            raise InputError(f"threads is {self.threads!r}, {expected}", setting="threads")
        if self.kv_tokens is not None and not (_is_whole(self.kv_tokens) and 1 <= self.kv_tokens <= MOST_KV_TOKENS):
            expected = f"expected a whole number of tokens, 1 to {MOST_KV_TOKENS}"
            raise InputError(f"kv_tokens is {self.kv_tokens!r}, {expected}", setting="kv_tokens")
        if self.kv not in KV_CHOICES:
            raise InputError(f"unknown kv {self.kv!r}, expected {' or '.join(KV_CHOICES)}", setting="kv")
        if self.prefill not in PREFILL_CHOICES:
            expected = f"expected {', '.join(PREFILL_CHOICES)}"
            raise InputError(f"unknown prefill {self.prefill!r}, {expected}", setting="prefill")
        object.__setattr__(self, "bundle", _path(self.bundle))
        object.__setattr__(self, "vram_budget", _bytes(self.vram_budget))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _path(value: object) -> Path | None:
    if value is None or (isinstance(value, str | os.PathLike) and os.fspath(value)):
        return None if value is None else Path(value)
    raise InputError(f"bundle is {value!r}, expected the path of a folder", setting="bundle")


def _bytes(value: object) -> int | None:
    if isinstance(value, str):
        return parse_size(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= UNLIMITED):
        return value
    expected = "expected bytes from 0 to 1 PiB, or a size such as '8GiB'"
    raise BudgetError(f"VRAM budget is {value!r}, {expected}", setting="vram_budget")
