"""Hot/cold neuron hybrid CPU-GPU inference: the model, its runtime, and the command line.

`Engine` and its types are imported on first use, so that `hybrid --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.generation import GenerationStats, GenerationStep, SamplingSettings
    from hybrid.runtime.config import EngineConfig
    from hybrid.runtime.engine import Engine

__all__ = ["Engine", "EngineConfig", "GenerationStats", "GenerationStep", "SamplingSettings"]

_HOMES = {"Engine": "runtime.engine", "EngineConfig": "runtime.config"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("profiler.common.artifact").package_version()
    if name in __all__:
        return getattr(import_module(f"hybrid.{_HOMES.get(name, 'generation')}"), name)
    raise AttributeError(f"module 'hybrid' has no attribute {name!r}")
