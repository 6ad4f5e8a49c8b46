"""Hot/cold neuron hybrid CPU-GPU inference: the model, its runtime, and the command line.

`Engine`, `AsyncEngine`, their types and `errors` are imported on first use, so that `hybrid --help` does not wait for
torch.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module, util

TYPE_CHECKING = False  # as `typing` has it; importing that takes longer than all else here, and Ctrl-C is not ours yet
if TYPE_CHECKING:
    from typing import Any

    from hybrid.generation import GenerationStats, GenerationStep, SamplingSettings
    from hybrid.runtime.config import EngineConfig
    from hybrid.runtime.engine import Engine
    from hybrid.serving.async_engine import AsyncEngine
    from hybrid.serving.config import ServingConfig
    from hybrid.serving.request import Request

__all__ = [
    "AsyncEngine",
    "Engine",
    "EngineConfig",
    "GenerationStats",
    "GenerationStep",
    "Request",
    "SamplingSettings",
    "ServingConfig",
]

_HOMES = {
    "Engine": "runtime.engine",
    "EngineConfig": "runtime.config",
    "AsyncEngine": "serving.async_engine",
    "ServingConfig": "serving.config",
    "Request": "serving.request",
}
_BESIDE = ("profiler", "predictor", "placement", "cpu_kernels", "gpu_kernels")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("profiler.common.artifact").package_version()
    if name == "errors":
        return import_module("hybrid.errors")
    if name in __all__:
        return getattr(import_module(f"hybrid.{_HOMES.get(name, 'generation')}"), name)
    raise AttributeError(f"module 'hybrid' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "errors"])


def _refuse_hidden_packages() -> None:
    """Raise `ImportError` where another module hides one of the packages that are installed beside this one.

    Their names are common: a user's own `profiler.py` beside the script that he runs is found before ours.
    """
    ours = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    for name in _BESIDE:
        found = _file_of(name)
        if found and os.path.realpath(found) != os.path.join(ours, name, "__init__.py"):
            raise ImportError(f"{found} hides the package {name!r} that hybrid needs; give it another name", name=name)


def _file_of(name: str) -> str | None:
    """The file that `import name` gives, or gave; None where there is none."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) or "a module without a file"
    found = util.find_spec(name)
    return found.origin if found else None


_refuse_hidden_packages()
