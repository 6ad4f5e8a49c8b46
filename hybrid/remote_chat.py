"""`hybrid chat --url`: the chat's screen over a server's model. Nothing of the model's own code is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from hybrid import options
from hybrid.chat.remote import RemoteModel
from hybrid.chat.repl import run_repl
from hybrid.chat.terminal import open_terminal

_OF_THE_SERVER = ("context", "threads", "vram_budget", "bundle", "mlock")


def remote_chat(url: str, api_key: str | None, system: str | None, given: Mapping[str, Any]) -> None:
    """Open the REPL, or answer piped lines. Raises as `RemoteModel` does."""
    for name in _OF_THE_SERVER:
        if given[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} is for a model that runs here; leave it out with --url")
    terminal = open_terminal()
    model = RemoteModel(url, api_key)
    header = f"{model.describe_placement()}. /help for commands."
    settings = options.chosen_sampling(model.settings, given)
    run_repl(model, terminal, settings, system, header=header, model_name=model.name)
