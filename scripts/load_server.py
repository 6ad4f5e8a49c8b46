"""Load a running server on this machine, and print how it bore it: a table and one JSON line.

    python scripts/load_server.py --rate 2 --minutes 10         requests at random times, 2 a second (Poisson)
    python scripts/load_server.py --at-once 8 --minutes 1       8 clients, each asks again once it has its answer
    python scripts/load_server.py --vanish 1000                 clients that go away in the middle of their answers

Prompts are random tokens, 16 to 1,500 of them, each different; answers do not end before their length. Goodput counts
the answers whose first token came within --ttft and whose others took at most --tpot each. Exit code 1 where a request
failed, or the server holds blocks or answers when all is done.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MOST_MINUTES, MOST_AT_ONCE = 60.0, 2000
PATIENCE = 600.0  # seconds that an answer may take
FIRST_TOKENS = 8  # of an ordinary token: special ones come before, in most vocabularies


@dataclass
class Answer:
    """What one client saw; times in seconds. failure: what went wrong, empty where nothing did."""

    prompt: int
    ttft: float = 0.0
    last: float = 0.0
    tokens: int = 0
    longest_gap: float = 0.0
    failure: str = ""

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.last - self.ttft) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Server:
    """Where it is, and what is to be known of it to ask. never: tokens that end answers."""

    host: str
    port: int
    api_key: str
    vocab: int
    context: int
    never: tuple[int, ...]

    @classmethod
    def look(cls, url: str, api_key: str) -> Server:
        """The server at `url`."""
        parts = urlsplit(url)
        if parts.hostname not in LOOPBACK:
            raise SystemExit(f"{url} is not on this machine; this script loads no other")
        blank = cls(parts.hostname, parts.port or 80, api_key, 0, 0, ())
        props = json.loads(blank.get("/props"))
        vocab = json.loads(blank.get("/v1/models"))["data"][0]["meta"]["n_vocab"]
        ends = json.loads(blank.get("/tokenize", {"content": props["eos_token"]}))["tokens"]
        context = props["default_generation_settings"]["n_ctx"]
        return cls(parts.hostname, parts.port or 80, api_key, vocab, context, tuple(ends))

    def get(self, path: str, body: dict[str, Any] | None = None) -> str:
        """The text of a whole answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"}
        host = f"[{self.host}]" if ":" in self.host else self.host
        request = urllib.request.Request(f"http://{host}:{self.port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()

    def metrics(self) -> dict[str, float]:
        """The figures of /metrics by their names."""
        lines = (line for line in self.get("/metrics").splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    async def ask(self, prompt: list[int], tokens: int, leave_after: int | None = None) -> Answer:
        """One answer, streamed; leave_after: tokens after which the client vanishes."""
        body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
        content = json.dumps(body | {"logit_bias": {str(token): -100 for token in self.never}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {self.api_key}\r\n"
        head += f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        answer, start = Answer(len(prompt)), time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    writer.write(head.encode() + content)
                    await self._read(reader, answer, start, leave_after)
                finally:
                    writer.close()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            answer.failure = f"{type(error).__name__}: {error}"
        return answer

    @staticmethod
    async def _read(reader: asyncio.StreamReader, answer: Answer, start: float, leave_after: int | None) -> None:
        status = (await reader.readline()).decode("latin-1").strip()
        if " 200 " not in f"{status} ":
            answer.failure = re.sub(r"^HTTP/\S+ ", "", status) or "closed without an answer"
            return
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return
            event, now = json.loads(line[6:]), time.monotonic() - start
            if "error" in event:
                answer.failure = event["error"]["message"]
                return
            answer.ttft = answer.ttft or now
            answer.longest_gap = max(answer.longest_gap, now - answer.last if answer.tokens else 0.0)
            answer.last = now
            timings = event.get("timings")
            answer.tokens = timings["predicted_n"] if timings else answer.tokens + 1
            if leave_after is not None and answer.tokens >= leave_after:
                return
        answer.failure = "the stream broke off"


@dataclass
class Run:
    """One load: its random numbers, what came of it, and the server's memory in MiB over time."""

    server: Server
    prompts: tuple[int, int]
    answers: tuple[int, int]
    seed: int
    pid: int | None
    found: list[Answer] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._tasks: set[asyncio.Task[None]] = set()

    async def one(self, leave_after: int | None = None) -> None:
        """Ask once, for a random number of tokens after a random prompt."""
        tokens = int(self._random.integers(self.answers[0], self.answers[1] + 1))
        most = min(self.prompts[1], self.server.context - tokens - 1)
        size = int(self._random.integers(min(self.prompts[0], most), most + 1))
        prompt = self._random.integers(FIRST_TOKENS, self.server.vocab, size).tolist()
        self.found.append(await self.server.ask(prompt, tokens, leave_after))

    async def poisson(self, rate: float, seconds: float) -> None:
        """Requests at random times for so many seconds; waits for the last answer."""
        end, at = time.monotonic() + seconds, time.monotonic()
        while (at := at + self._random.exponential(1 / rate)) < end:
            await asyncio.sleep(at - time.monotonic())
            task = asyncio.create_task(self.one())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.gather(*self._tasks)

    async def at_once(self, clients: int, seconds: float) -> None:
        """So many clients, each of which asks again once it has its answer."""
        end = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                await self.one()

        await asyncio.gather(*(client() for _ in range(clients)))

    async def vanish(self, clients: int) -> None:
        """So many clients, up to 100 at a time, that go away after 1 to 8 tokens."""
        gate = asyncio.Semaphore(100)

        async def client() -> None:
            async with gate:
                await self.one(int(self._random.integers(1, 9)))

        await asyncio.gather(*(client() for _ in range(clients)))

    async def watched(self, load: Coroutine[Any, Any, None]) -> float:
        """Run `load` and look at the server's memory each second; the seconds that it took."""
        start, task = time.monotonic(), asyncio.create_task(load)
        while not task.done():
            if self.pid is not None:
                status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
                self.memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)  # type: ignore[index]
            await asyncio.wait({task}, timeout=1)
        await task
        return time.monotonic() - start


def left_behind(server: Server) -> dict[str, float]:
    """What the server holds though nobody waits any more; it has some seconds to see that."""
    names = ("llamacpp:requests_processing", "llamacpp:requests_deferred", "hybrid:kv_blocks_used")
    for _ in range(50):
        metrics = server.metrics()
        held = {name: metrics[name] for name in names if metrics[name]}
        if not held:
            break
        time.sleep(0.1)
    return held


def report(run: Run, seconds: float, most_ttft: float, most_tpot: float) -> dict[str, Any]:
    """All figures of a run, by their names."""
    done = [answer for answer in run.found if not answer.failure]
    good = [answer for answer in done if answer.ttft <= most_ttft and answer.tpot <= most_tpot]
    tokens = sum(answer.tokens for answer in done)
    failures: dict[str, int] = {}
    for answer in run.found:
        if answer.failure:
            failures[answer.failure] = failures.get(answer.failure, 0) + 1
    memory = run.memory or [0.0]
    metrics = run.server.metrics()
    return {
        "seconds": seconds,
        "requests": len(run.found),
        "failed": len(run.found) - len(done),
        "failures": failures,
        "requests_per_second": len(done) / seconds,
        "tokens_per_second": tokens / seconds,
        "goodput_per_second": len(good) / seconds,
        "good_share": len(good) / max(1, len(done)),
        **{f"ttft_p{p}": percentile([answer.ttft for answer in done], p) for p in (50, 90, 99)},
        **{f"tpot_p{p}": percentile([answer.tpot for answer in done], p) for p in (50, 90, 99)},
        "longest_gap": max((answer.longest_gap for answer in done), default=0.0),
        "longest_pause": metrics["hybrid:longest_pause_seconds"],
        "preempted": metrics["hybrid:preempted_total"],
        "memory_first_mib": memory[len(memory) // 10],
        "memory_most_mib": max(memory),
        "memory_last_mib": memory[-1],
        "left_behind": left_behind(run.server),
    }


def percentile(values: list[float], p: int) -> float:
    return float(np.percentile(values, p)) if values else 0.0


def table(found: dict[str, Any]) -> str:
    """The figures, one a line."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in found.items()}
    width = max(map(len, shown))
    return "\n".join(f"{name:{width}}  {value}" for name, value in shown.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--api-key", default="")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--rate", type=float, help="requests a second, on average")
    kind.add_argument("--at-once", type=int, help="clients that ask one after another")
    kind.add_argument("--vanish", type=int, help="clients that go away")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, nargs=2, default=(16, 1500), metavar=("LEAST", "MOST"))
    parser.add_argument("--answers", type=int, nargs=2, default=(16, 128), metavar=("LEAST", "MOST"))
    parser.add_argument("--ttft", type=float, default=2.0)
    parser.add_argument("--tpot", type=float, default=0.1)
    parser.add_argument("--pid", type=int, help="the server's, to watch its memory")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not 0 < given.minutes <= MOST_MINUTES or max(given.at_once or 1, (given.vanish or 1) // 10) > MOST_AT_ONCE:
        parser.error(f"at most {MOST_MINUTES:g} minutes, {MOST_AT_ONCE} clients at once, {10 * MOST_AT_ONCE} in all")
    server = Server.look(given.url, given.api_key)
    run = Run(server, tuple(given.prompts), tuple(given.answers), given.seed, given.pid)
    loads: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "rate": lambda: run.poisson(given.rate, 60 * given.minutes),
        "at_once": lambda: run.at_once(given.at_once, 60 * given.minutes),
        "vanish": lambda: run.vanish(given.vanish),
    }
    name = next(name for name in loads if getattr(given, name) is not None)
    seconds = asyncio.run(run.watched(loads[name]()))
    found = {name: getattr(given, name), **report(run, seconds, given.ttft, given.tpot)}
    print(table(found))
    print(json.dumps(found))
    sys.exit(1 if found["failed"] or found["left_behind"] else 0)


if __name__ == "__main__":
    main()
