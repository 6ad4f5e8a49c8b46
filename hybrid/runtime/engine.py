"""`Engine`: a loaded model that answers. Prefill, decode, the KV cache across calls, stop conditions, statistics.

Everything runs on the calling thread but the kernels, which share the engine's `WorkerPool`, and torch's own threads in
prefill, whose number is the caller's again when a token is given. Where torch was not imported before this room, they
soon sleep where they wait (`profiler.common.openmp`). An engine serves one answer at a time; a generator that is closed
early leaves it ready for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from time import perf_counter

import torch

from hybrid.errors import InputError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.formats.messages import Message
from hybrid.generation import FinishReason, GenerationStats, GenerationStep, SamplingSettings
from hybrid.model.ffn import FFNCounters
from hybrid.model.kv_cache import KVCache, Row
from hybrid.model.loader import ModelFolder
from hybrid.runtime.answers import AnswerText, answer_stats, check_prompt
from hybrid.runtime.config import EngineConfig
from hybrid.runtime.load import LoadedModel, load_model
from hybrid.runtime.plan import plan_run
from hybrid.runtime.sampling import Sampler, load_sampling_kernels
from placement.placement import Placement
from predictor.bank import PredictorBank


class Engine:
    """A model, its tokenizer, its placement and one KV cache."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Reserves a KV cache for `loaded`, which may serve other engines too, and compiles what a token needs."""
        self.loaded, self.plan = loaded, loaded.plan
        self.model, self.codec, self.runtime = loaded.model, loaded.codec, loaded.runtime
        self.settings, self.end_tokens = loaded.settings, loaded.end_tokens
        self.placement = self.plan.placement
        self._cache, self._cached_tokens = KVCache(self.plan.spec, self.plan.context), list[int]()
        self.runner = loaded.runner(self._cache)
        self.notices = (*self.plan.notices, *loaded.notices, *self.runner.notices)
        self._answer = 0
        self.runner.load_kernels()
        load_sampling_kernels()

    @classmethod
    def load(
        cls,
        model: str | Path | ModelFolder = EMBEDDED_MODEL,
        config: EngineConfig | None = None,
        placement: Placement | None = None,
        bank: PredictorBank | None = None,
        device: torch.device | None = None,
    ) -> Engine:
        """Load a Hugging Face model folder with its artefacts; `placement`, `bank` and `device` are for `plan_run`.

        Raises an `InputError` of some kind when the model, an artefact or the configuration cannot be used.
        """
        folder = model if isinstance(model, ModelFolder) else ModelFolder.open(Path(model))
        return cls(load_model(plan_run(folder, config, placement, bank, device)))

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._cache.capacity

    def generate(
        self,
        prompt: str | Sequence[int],
        settings: SamplingSettings | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generator[GenerationStep, None, None]:
        """Continue `prompt`, text or token ids, one step per token; `progress(done, total)` follows a long prefill.

        Raises `ContextError` when the prompt leaves no room in the context.
        """
        tokens = self.codec.encode_prompt(prompt, enough=self.context)
        return self._stream(tokens, settings or self.settings, progress)

    def reply(
        self,
        messages: Sequence[Message],
        settings: SamplingSettings | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generator[GenerationStep, None, None]:
        """Answer a conversation. Keys and values of what it shares with the last call are reused.

        Raises `InputError` for messages that are none, `ContextError` when they leave no room in the context.
        """
        return self._stream(self.codec.encode_chat(messages, enough=self.context), settings or self.settings, progress)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt that `reply` would make of `messages`; counting a long one ends beyond the context."""
        return len(self.codec.encode_chat(messages, enough=self.context))

    def reset(self) -> None:
        """Forget the KV cache."""
        self._cache.truncate(0)
        self._cached_tokens.clear()

    def close(self) -> None:
        """End the worker threads; dropping the engine does so too."""
        self.runner.rest()
        self.runtime.pool.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe_placement(self) -> str:
        """One line per layer: neurons hot and cold, and where the rest of the layer is."""
        if self.plan.gpu is None:
            return f"No GPU is used: the CPU computes every layer and neuron, with {self.plan.threads} threads."
        return f"{self.placement.table()}\nThe hot neurons are on the GPU."

    def _stream(
        self, tokens: list[int], settings: SamplingSettings, progress: Callable[[int, int], None] | None
    ) -> Generator[GenerationStep, None, None]:
        check_prompt(tokens, self.context, self.model.spec.vocab_size)
        return self._answer_of(tokens, settings, progress or (lambda done, total: None))

    def _answer_of(
        self, tokens: list[int], settings: SamplingSettings, progress: Callable[[int, int], None]
    ) -> Generator[GenerationStep, None, None]:
        self._answer = answer = self._answer + 1
        try:
            yield from self._decode(answer, tokens, settings, progress)
        finally:
            if self._answer == answer:  # or the workers are another answer's, which may be in the middle of a step
                self.runner.rest()

    def _decode(
        self, answer: int, tokens: list[int], settings: SamplingSettings, progress: Callable[[int, int], None]
    ) -> Generator[GenerationStep, None, None]:
        start = perf_counter()
        seen, first, text = list(tokens), 0.0, AnswerText(self.codec, settings.stop, tokens)
        sampler = Sampler(settings, seen)
        logits, reused = self._prefill(tokens, progress)
        self.runtime.counters = FFNCounters()
        ends = self.end_tokens | self.codec.special_ids(settings.stop)
        token = sampler.pick(logits)
        for count in range(1, settings.max_new_tokens + 1):
            seen.append(token)
            now = perf_counter()
            first = first or now
            piece, finish = (
                text.push(token, ended=token in ends),
                self._finish(text, token in ends, seen, count, settings),
            )
            if finish:
                piece += text.rest()
            stats = self._stats(len(tokens), reused, count, first - start, now - first)
            yield GenerationStep(piece, token, stats, finish)
            if finish:
                return
            if self._answer != answer:
                raise InputError("this answer was ended by another call of the engine; take one answer at a time")
            token = self._next(sampler, seen)

    def _next(self, sampler: Sampler, seen: list[int]) -> int:
        """The token after those `seen`, of which the last joins the KV cache."""
        (following,) = self.runner.next_tokens([Row(self._cache, seen[-1])], [sampler])
        self._cached_tokens.append(seen[-1])
        return following

    def _finish(
        self, text: AnswerText, ended: bool, seen: list[int], count: int, settings: SamplingSettings
    ) -> FinishReason | None:
        if text.stopped or ended:
            return "stop"
        if count == settings.max_new_tokens:
            return "length"
        return "context" if len(seen) >= self.context else None

    def _prefill(self, tokens: list[int], progress: Callable[[int, int], None]) -> tuple[torch.Tensor, int]:
        """Logits after `tokens`, and how many of them were in the cache already."""
        reused = 0
        for cached, token in zip(self._cached_tokens, tokens[:-1], strict=False):
            if cached != token:
                break
            reused += 1
        self._cache.truncate(reused)
        del self._cached_tokens[reused:]
        logits = torch.empty(0)
        for at in range(reused, len(tokens), self.runner.chunk):
            progress(at - reused, len(tokens) - reused)
            piece = tokens[at : at + self.runner.chunk]
            logits = self.runner.read(piece, len(tokens))
            self._cached_tokens += piece
        progress(len(tokens) - reused, len(tokens) - reused)
        return logits, reused

    def _stats(self, prompt: int, reused: int, count: int, ttft: float, decode: float) -> GenerationStats:
        on_gpu = self.plan.gpu is not None
        return answer_stats(self.runtime.counters, on_gpu, prompt, reused, count, ttft, decode)
