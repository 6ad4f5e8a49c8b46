"""The exceptions that a user can meet, in one place to import from (see `profiler.errors` for why they live there)."""

from profiler.errors import (
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
