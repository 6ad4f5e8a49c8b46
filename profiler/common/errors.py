"""The exceptions that a user can meet. `hybrid.errors` is their public home, and the one that tracebacks name.

They are defined here because imports go one way and every package above may raise them. Each message is one
line: what was found, what was expected, what to do next.
"""

from __future__ import annotations

import reprlib


class HybridError(Exception):
    """A failure while running. The command line prints its message as one line and exits with `exit_code`.

    setting: the field of `EngineConfig` or `SamplingSettings` that another value would help, if any; the command line
    adds its flag to the message, which itself speaks of settings and not of flags.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class InputError(HybridError):
    """Bad usage or bad input: nothing was changed, and a corrected call can succeed."""

    exit_code = 2


class ModelError(InputError):
    """A model folder that cannot be loaded: missing, truncated, incomplete, or of an arithmetic not known here."""


class CorpusError(InputError):
    """A corpus that is missing, empty, binary, malformed or too short."""


class ArtifactError(InputError):
    """An artefact that is missing, corrupt, of a newer format, or that could not be written."""


class ArtifactMismatchError(ArtifactError):
    """An artefact made for another model, or from other inputs than those in use."""


class BudgetError(InputError):
    """A VRAM budget that is not a size, is negative, or is beyond any machine."""


class ContextError(InputError):
    """A prompt or context longer than the model or the KV cache holds."""


def shown(value: object) -> str:
    """`value` as an error message can name it: on one line, and short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)
