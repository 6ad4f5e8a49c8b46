"""What a model folder says of how its answers are made: sampling settings and end tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import ModelError
from hybrid.formats.config import read_json
from hybrid.generation import SamplingSettings


@dataclass(frozen=True)
class GenerationDefaults:
    """The settings of `generation_config.json`, and all end tokens that it or `config.json` names.

    notes: one line for each value of the file that cannot be used, saying what is taken instead.
    """

    settings: SamplingSettings
    end_tokens: tuple[int, ...]
    notes: tuple[str, ...] = ()


def generation_defaults(folder: Path) -> GenerationDefaults:
    """What the files say; greedy where they say nothing. Raises `ModelError` for end tokens that are no ids."""
    path, config = folder / "generation_config.json", folder / "config.json"
    values = read_json(path) if path.is_file() else {}
    ends = _end_tokens(path, values.get("eos_token_id")) + _end_tokens(config, read_json(config).get("eos_token_id"))
    settings, unused = SamplingSettings.from_file(values)
    notes = tuple(f"{path.name}: {line}" for line in unused)
    return GenerationDefaults(settings, tuple(dict.fromkeys(ends)), notes)


def _end_tokens(path: Path, value: object) -> list[int]:
    ends: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise ModelError(f"{path}: eos_token_id is {str(value)[:60]}, expected token ids; correct the file")
    return ends
