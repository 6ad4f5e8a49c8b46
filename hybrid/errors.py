"""The exceptions that a user can meet, to import from one place; `profiler.common.errors` says why they live there."""

from profiler.common.errors import (
    ArtifactError,
    ArtifactMismatchError,
    BudgetError,
    ContextError,
    CorpusError,
    HybridError,
    InputError,
    ModelError,
)

__all__ = [
    "ArtifactError",
    "ArtifactMismatchError",
    "BudgetError",
    "ContextError",
    "CorpusError",
    "HybridError",
    "InputError",
    "ModelError",
]

for _name in __all__:  # what a traceback calls them, which is where they are imported from
    globals()[_name].__module__ = __name__
