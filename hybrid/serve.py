"""`hybrid serve`: the server's command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hybrid.commands import engine_config, open_model
from hybrid.errors import InputError
from hybrid.serving.async_engine import AsyncEngine
from hybrid.serving.config import ServingConfig


def serve(model: Path | None, options: Mapping[str, Any]) -> None:
    """Serve a model until Ctrl-C or SIGTERM. Raises `InputError` where the extra `serve` is not installed."""
    try:
        from hybrid.server.serve import serve as serve_engine
        from hybrid.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs the package {error.name}: pip install hybrid-inference[serve]") from error
    config = engine_config(options)
    names = ("kv_tokens", "max_pause", "max_running", "max_waiting")
    serving = ServingConfig(**{name: options[name] for name in names})
    settings = ServerSettings(
        **{name: options[name] for name in ("host", "port", "api_key", "max_connections", "grace")},
        max_body=options["max_body"] * 2**20,
        cors=tuple(options["cors"]),
        slots=serving.max_running,
    )
    if settings.is_open:
        _say(f"note: whoever reaches {settings.host} may ask; --api-key asks for a key")

    def load() -> AsyncEngine:
        engine = AsyncEngine.load(open_model(model, options), config, serving)
        for notice in engine.notices:
            _say(f"note: {notice}")
        return engine

    serve_engine(load, settings, _say)


def _say(line: str) -> None:
    click.echo(line, err=True)
