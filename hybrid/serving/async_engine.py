"""`AsyncEngine`: a loaded model that answers many at once, from any event loop.

Threads: one steps (`Stepper`); everything else is done by the caller's event loop: prompts are checked and sampling is
set up there, tokens become text and statistics there, and a stop string that is found there gives the answer up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import astuple, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter

from hybrid.errors import InputError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.generation import GenerationStats, GenerationStep, SamplingSettings
from hybrid.model.ffn import FFNCounters
from hybrid.model.kv_cache import KVCache, KVPool, check_context
from hybrid.model.loader import ModelFolder
from hybrid.runtime.answers import AnswerText, answer_stats, check_prompt
from hybrid.runtime.config import EngineConfig
from hybrid.runtime.load import LoadedModel, load_model
from hybrid.runtime.plan import plan_run
from hybrid.runtime.sampling import load_sampling_kernels
from hybrid.serving.answer import Answer, Produced
from hybrid.serving.config import ServingConfig, pool_tokens
from hybrid.serving.constraint import Constraints
from hybrid.serving.figures import EngineFigures
from hybrid.serving.request import MOST_LOGPROBS, Request, ServedStep, TokenLogprob
from hybrid.serving.scheduler import Scheduler
from hybrid.serving.stepper import Mailbox, Stepper
from placement.workspace import SERVER_ROWS
from profiler.common.spec import ModelSpec


class AsyncEngine:
    """A model, its tokenizer, one KV pool, and a thread that computes the tokens of all answers together.

    Used from event loops, of one thread or several. `close` ends the thread; so does `async with`.
    """

    def __init__(self, loaded: LoadedModel, serving: ServingConfig | None = None) -> None:
        """Reserves a KV pool for `loaded`, of which this engine is the only user, and compiles what tokens need."""
        serving, plan = serving or ServingConfig(), loaded.plan
        self.loaded, self.serving, self.plan, self.codec = loaded, serving, plan, loaded.codec
        self.settings, self.end_tokens, self.name = loaded.settings, loaded.end_tokens, plan.folder.path.name
        tokens = pool_tokens(serving, plan)
        self._pool, self.context = KVPool(plan.spec, tokens), min(plan.context, tokens)
        runner = loaded.runner(KVCache(plan.spec, self.context, self._pool), SERVER_ROWS)
        self.notices = (*plan.notices, *loaded.notices, *runner.notices)
        runner.load_kernels()
        load_sampling_kernels()
        limit = _prefix_limit(plan.spec)
        self._scheduler = Scheduler(runner, self._pool, serving, loaded.runtime, perf_counter, limit)
        self._stepper = Stepper(self._scheduler, runner.rest)

    @classmethod
    def load(
        cls,
        model: str | Path | ModelFolder = EMBEDDED_MODEL,
        config: EngineConfig | None = None,
        serving: ServingConfig | None = None,
    ) -> AsyncEngine:
        """Load a model folder with its artefacts, as `Engine.load` does; it blocks.

        Raises an `InputError` of some kind when the model, an artefact or the configuration cannot be used.
        """
        folder = model if isinstance(model, ModelFolder) else ModelFolder.open(Path(model))
        config, serving = config or EngineConfig(), serving or ServingConfig()
        planned = serving.kv_tokens or check_context(folder.spec, config.context)
        return cls(load_model(plan_run(folder, replace(config, kv_tokens=planned))), serving)

    @cached_property
    def constraints(self) -> Constraints:
        """Makes the constraints of requests. Raises `InputError` where the extra `serve` is not installed."""
        return Constraints(self.codec.tokenizer, self.plan.spec.vocab_size, self.end_tokens)

    @property
    def failure(self) -> BaseException | None:
        """Why the step thread ended, None while it lives, and where it was closed."""
        return self._stepper.failure

    def on_failure(self, call: Callable[[BaseException], None]) -> None:
        """Have `call` called with what ended the step thread, if an exception does: on that thread, after all answers
        were told, or at once where that has been."""
        self._stepper.on_failure(call)

    async def generate(self, request: Request) -> AsyncGenerator[ServedStep, None]:
        """Answer, one step per token. Leaving it early (`aclose`, a cancelled task) gives the answer up.

        Raises at the first step `InputError`, `ContextError` for a prompt that is none or leaves no room,
        `QueueFullError`, and `EngineStoppedError` where the engine is closed; later `DeadlineError`, `InputError` where
        the constraint takes no token, and `EngineStoppedError`.
        """
        answer, mailbox = self._begin(request)
        text = AnswerText(self.codec, request.settings.stop, request.prompt)
        try:
            finish = None
            while finish is None:
                produced = await mailbox.next()
                assert isinstance(produced, Produced)  # an end without a token is an error, and raised
                shown, finish = text.push(produced.token, produced.token in answer.ends), produced.finish
                if text.stopped:
                    finish = "stop"
                if finish:
                    shown += text.rest()
                step = GenerationStep(shown, produced.token, self._stats(produced), finish)
                yield ServedStep(step, produced.logprob)
        finally:
            self._stepper.cancel(answer)

    async def score(self, prompt: Sequence[int], top: int = 0, deadline: float | None = None) -> list[TokenLogprob]:
        """Log-probabilities of the prompt's tokens, each by those before it, with the `top` likeliest in its place.
        deadline: as of a `Request`.

        Raises as `generate` does.
        """
        if not 0 <= top <= MOST_LOGPROBS:
            raise InputError(f"top is {top}, expected 0 to {MOST_LOGPROBS}")
        request = Request(tuple(prompt), SamplingSettings(temperature=0), deadline=deadline)
        answer, mailbox = self._begin(request, top)
        try:
            await mailbox.next()
        finally:
            self._stepper.cancel(answer)
        return answer.scores

    def figures(self) -> EngineFigures:
        """What it does and has done. From any thread; a step that goes on meanwhile may be counted in part."""
        scheduler, counters = self._scheduler, self._scheduler.counters
        tally, held = scheduler.tally, scheduler.answers()
        waiting = len(scheduler.waiting)
        return EngineFigures(
            running=max(0, len(held) - waiting),
            waiting=waiting,
            kv_blocks=self._pool.blocks,
            kv_blocks_used=len(set[int]().union(*(answer.cache.blocks for answer in held))),
            kv_blocks_cached=scheduler.tree.blocks,
            prefix_hit_tokens_total=tally.prefix_hit_tokens,
            prompt_tokens_total=tally.prompt_tokens,
            prompt_seconds_total=tally.prompt_seconds,
            generated_tokens_total=tally.generated_tokens,
            generated_seconds_total=tally.generated_seconds,
            steps_total=tally.steps,
            rows_total=tally.rows,
            requests_total=tally.requests,
            cancelled_total=tally.cancelled,
            preempted_total=tally.preempted,
            hot_share=counters.fired_hot / counters.fired if counters.fired and self.plan.gpu else None,
            active_share=counters.computed / counters.neurons if counters.neurons else None,
            cpu_wait_seconds_total=counters.wait_seconds,
            longest_pause_seconds=tally.longest_pause_seconds,
        )

    def restart_longest_pause(self) -> None:
        """Have the figure of the longest pause begin anew, for a measurement. While nothing runs: a pause that is just
        over may count or not."""
        self._scheduler.tally.longest_pause_seconds = 0.0

    async def close(self, grace: float = 0.0) -> None:
        """Take no more; finish what runs within `grace` seconds, cancel the rest, end the threads."""
        self._stepper.stop(grace)
        await asyncio.to_thread(self._stepper.join)
        self.loaded.runtime.pool.close()
        if "constraints" in vars(self):
            self.constraints.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _begin(self, request: Request, top: int | None = None) -> tuple[Answer, Mailbox]:
        self._stepper.check()
        vocab = self.plan.spec.vocab_size
        check_prompt(request.prompt, self.context, vocab)
        unknown = next((token for token in request.logit_bias if not 0 <= token < vocab), None)
        if unknown is not None:
            raise InputError(f"logit_bias names the token {unknown}, expected 0 to {vocab - 1}")
        ends = self.end_tokens | self.codec.special_ids(request.settings.stop)
        cache = KVCache(self.plan.spec, self.context, self._pool)
        answer, mailbox = Answer(request, ends, cache, perf_counter(), top), Mailbox()
        self._stepper.submit(answer, mailbox)
        return answer, mailbox

    def _stats(self, produced: Produced) -> GenerationStats:
        answer = produced.answer
        counters = (
            now - before for now, before in zip(astuple(produced.counters), astuple(answer.before), strict=True)
        )
        on_gpu, prompt = self.plan.gpu is not None, len(answer.prompt)
        times = answer.first - answer.arrived, produced.time - answer.first
        return answer_stats(FFNCounters(*counters), on_gpu, prompt, answer.cached or 0, produced.generated, *times)


def _prefix_limit(spec: ModelSpec) -> int | None:
    """Of `PrefixTree`: where a RoPE follows the length of the text, the length from which on it does."""
    ropes = [rope for rope in (spec.rope, spec.other_rope) if rope is not None and rope.follows_length]
    return min((rope.original_context for rope in ropes), default=None)
