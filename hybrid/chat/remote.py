"""A model that a server runs: `RemoteModel` is to the chat loop what an engine is, over the API of `hybrid serve`.

One connection per call, which closing the answer closes: the server gives the answer up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from hybrid.errors import ContextError, HybridError, InputError
from hybrid.generation import FinishReason, GenerationStats, GenerationStep, SamplingSettings

_SECONDS = 600.0  # that a server may take for the next piece
_LINE = 2**20


class RemoteModel:
    """The model of the server at `url`."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Asks the server what it runs. Raises `InputError` for what is no URL, `HybridError` where no such server
        answers."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if not host or parts.scheme not in ("http", "https"):
            raise InputError(f"{url!r} is no server's URL, expected one such as http://127.0.0.1:8080", setting="url")
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._connect = lambda: kind(host, port, timeout=_SECONDS)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        props = self._ask("GET", "/props")
        try:
            defaults = props["default_generation_settings"]
            self.context, self.name = int(defaults["n_ctx"]), str(props.get("model_alias") or "model")
            self.settings = _settings(defaults["params"])
        except (KeyError, TypeError, ValueError) as error:
            raise HybridError(f"{self.url} is no server that this chat knows: its /props lack {error}") from error
        self._plan = str(props.get("plan") or "how it runs is not told")

    def describe_placement(self) -> str:
        """What the server says of how it runs the model."""
        return f"{self.name} at {self.url}: {self._plan}"

    def reset(self) -> None:
        """Nothing is kept here."""

    def count_tokens(self, messages: list[dict[str, str]]) -> int:
        """Tokens of the prompt that the server makes of `messages`. Raises `HybridError` as `reply` does."""
        return int(self._ask("POST", "/v1/messages/count_tokens", {"messages": messages})["input_tokens"])

    def reply(
        self,
        messages: list[dict[str, str]],
        settings: SamplingSettings,
        progress: Callable[[int, int], None],
    ) -> Generator[GenerationStep, None, None]:
        """Stream the answer to `messages`. Raises `HybridError` for what the server says or where it goes away."""
        with closing(self._connect()) as connection:
            response = self._send(connection, "POST", "/v1/chat/completions", _body(messages, settings))
            count = 0
            for chunk in self._events(response):
                if "error" in chunk:
                    raise _refusal(response.status, chunk)
                for choice in chunk.get("choices") or ():
                    text, finish = choice["delta"].get("content") or "", choice.get("finish_reason")
                    count += bool(text)
                    timings = chunk.get("timings")
                    stats = _stats(timings) if timings else GenerationStats(0, generated_tokens=count)
                    yield GenerationStep(text, 0, stats, self._finish(finish, stats))

    def _finish(self, finish: str | None, stats: GenerationStats) -> FinishReason | None:
        if finish != "length":
            return None if finish is None else "stop"
        return "context" if stats.prompt_tokens + stats.generated_tokens >= self.context else "length"

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON of a whole answer."""
        with closing(self._connect()) as connection:
            return _json(self._send(connection, method, path, body).read())

    def _send(self, connection: HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None) -> HTTPResponse:
        """The answer to a request, its body unread. Raises `HybridError` for one that says no."""
        content = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._base + path, content, self._headers)
            response = connection.getresponse()
            refused = None if response.status == 200 else response.read()
        except (OSError, HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise HybridError(f"no server answers at {self.url}: {reason}; start one with `hybrid serve`") from error
        if refused is not None:
            raise _refusal(response.status, _json(refused))
        return response

    def _events(self, response: HTTPResponse) -> Iterator[dict[str, Any]]:
        """The events of a stream up to its end. Raises `HybridError` where it breaks off."""
        try:
            while line := response.readline(_LINE):
                data = line.strip().removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if line.startswith(b"data:"):
                    yield _json(data)
        except (OSError, HTTPException) as error:
            raise HybridError(f"the server at {self.url} went away: {error or type(error).__name__}") from error
        raise HybridError(f"the server at {self.url} went away in the middle of an answer")


def _body(messages: list[dict[str, str]], settings: SamplingSettings) -> dict[str, Any]:
    """The request for an answer."""
    sampling = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    return {
        "messages": messages,
        "stream": True,
        "max_tokens": settings.max_new_tokens,
        "stop": list(settings.stop),
        **{name: getattr(settings, name) for name in sampling},
    }


def _settings(found: Mapping[str, Any]) -> SamplingSettings:
    """The settings that a server has by default; those that are not known or not usable here are ours."""
    settings = SamplingSettings()
    for name in SamplingSettings.names():
        try:
            settings = replace(settings, **{name: found[name]}) if name in found else settings
        except InputError:
            continue
    return settings


def _stats(timings: Mapping[str, Any]) -> GenerationStats:
    cached = int(timings.get("cache_n", 0))
    return GenerationStats(
        prompt_tokens=cached + int(timings.get("prompt_n", 0)),
        cached_tokens=cached,
        generated_tokens=int(timings.get("predicted_n", 0)),
        ttft_seconds=timings.get("prompt_ms", 0) / 1000,
        decode_seconds=timings.get("predicted_ms", 0) / 1000,
        active_share=timings.get("active_share"),
        hot_share=timings.get("hot_share"),
    )


def _json(data: bytes) -> dict[str, Any]:
    """An object. Raises `HybridError` for anything else."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise HybridError(f"the server answers what is no JSON object: {data[:60]!r}")
    return found


def _refusal(status: int, content: Mapping[str, Any]) -> HybridError:
    error = content.get("error")
    said = error if isinstance(error, dict) else {"message": error}
    message = " ".join(str(said.get("message") or f"status {status}").split())
    if said.get("code") == "context_length_exceeded":
        return ContextError(message)
    return HybridError(f"the server refuses: {message}")
