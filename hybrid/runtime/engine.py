"""`Engine`: a loaded model that answers. Prefill, decode, the KV cache across calls, stop conditions, statistics.

Everything runs on the calling thread but the kernels, which share the engine's `WorkerPool`, and torch's own threads in
prefill, whose number the engine sets for the whole process. An engine serves one answer at a time; a generator that is
closed early leaves it ready for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from cpu_kernels.worker_pool import WorkerPool, available_cpus
from hybrid.errors import BudgetError, ContextError, InputError
from hybrid.formats.bundle import EMBEDDED_MODEL, Bundle
from hybrid.formats.packed import PackedModel
from hybrid.formats.text import Message, StreamDecoder, TextCodec, generation_defaults
from hybrid.generation import FinishReason, GenerationStats, GenerationStep, SamplingSettings
from hybrid.model.ffn import FFNCounters, FFNRuntime
from hybrid.model.kv_cache import KVCache
from hybrid.model.loader import ModelFolder
from hybrid.model.transformer import Transformer
from hybrid.runtime.devices import gpu_of, hardware_of, placement_for
from hybrid.runtime.runner import CpuRunner, Runner
from hybrid.runtime.sampling import Sampler, load_sampling_kernels
from placement.placement import Placement
from predictor.bank import PredictorBank
from profiler.common.spec import STRATEGIES, Strategy

NO_GPU = "\nBoth devices are the CPU, as no GPU is used."
# Pieces of a prompt this short go through the kernels, 8 tokens at a time: widening all weights for GEMMs takes longer.
_FEW_TOKENS = 32
_CONTEXT_TOKENS = 8  # of the prompt, that a decoder may need to see: some drop the space of a text's first word


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model; checked when built.

    sparsity: a strategy, or `auto`: `learned` where the activation fires sparsely and `dense` where it does not.
    context: tokens that the KV cache holds, by default the model's. threads: CPU threads, by default all available,
    beside a GPU all but one in eight. bundle: the folder of the artefacts, by default the model's own. vram_budget:
    bytes that may be taken from the GPU, 0 for none; by default what the stored placement was made for, at most what is
    free.
    """

    sparsity: str = "auto"
    context: int | None = None
    threads: int | None = None
    bundle: Path | None = None
    vram_budget: int | None = None

    def __post_init__(self) -> None:
        if self.sparsity not in ("auto", *STRATEGIES):
            raise InputError(f"unknown sparsity {self.sparsity!r}, expected auto, {', '.join(STRATEGIES)}")
        if self.context is not None and self.context < 1:
            raise ContextError(f"context {self.context} is out of range, expected at least 1 token")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise InputError(f"threads is {self.threads}, expected 1 to 1024; this machine offers {available_cpus()}")
        if self.vram_budget is not None and self.vram_budget < 0:
            raise BudgetError(f"VRAM budget is {self.vram_budget} bytes, expected at least 0; choose another")


class Engine:
    """A model, its tokenizer, its placement and one KV cache."""

    def __init__(
        self,
        model: Transformer,
        codec: TextCodec,
        runtime: FFNRuntime,
        placement: Placement,
        cache: KVCache,
        runner: Runner,
    ) -> None:
        self.model, self.codec, self.runtime, self.placement = model, codec, runtime, placement
        self.settings, self.end_tokens = SamplingSettings(), frozenset[int]()
        self.notices: tuple[str, ...] = ()
        self.runner = runner
        self._cache, self._cached_tokens = cache, list[int]()
        self._answer = 0

    @classmethod
    def load(
        cls,
        model: str | Path = EMBEDDED_MODEL,
        config: EngineConfig | None = None,
        placement: Placement | None = None,
        bank: PredictorBank | None = None,
        device: torch.device | None = None,
    ) -> Engine:
        """Load a Hugging Face model folder with its artefacts; `placement` and `bank` stand in for the stored ones.

        device: where the placement's GPU part goes, by default the first GPU, if there is one. Raises an `InputError`
        of some kind when the model, an artefact or the configuration cannot be used.
        """
        config = config or EngineConfig()
        folder = ModelFolder.open(Path(model))
        spec = folder.spec
        strategy = choose_strategy(config.sparsity, spec.activation, spec.fires_sparsely)
        bundle = Bundle.of(folder.path, spec, config.bundle)
        cache = KVCache(spec, config.context or spec.max_context)
        if strategy == "learned" and bank is None and not folder.is_packed:
            bank = bundle.load_predictors(spec)
        notices = [] if spec.fires_sparsely else [f"{spec.activation} fires densely: every neuron is computed"]
        gpu = device or gpu_of(config.vram_budget)
        if placement is None:
            placement = placement_for(bundle, folder, strategy, cache.capacity, gpu, config.vram_budget, notices)
        gpu = gpu if placement.choice.uses_gpu else None
        codec = TextCodec(folder.path, spec.vocab_size)
        threads = config.threads or cpu_threads(gpu is not None)
        runtime = FFNRuntime(strategy, WorkerPool(threads), spec.d_model, spec.d_ff, few=_FEW_TOKENS)
        built = folder.build(runtime, placement, bank)
        advise = folder.weights.advise if isinstance(folder.weights, PackedModel) else lambda scattered: None
        runner: Runner
        if gpu is None:
            runner = CpuRunner(built, cache, runtime, advise)
        else:
            try:  # needs triton, which comes with torch's builds for GPUs
                from hybrid.runtime.gpu.runner import GpuRunner
            except ModuleNotFoundError as error:
                raise InputError(
                    f"a GPU needs the package {error.name}: pip install {error.name}; or give --vram-budget 0"
                ) from error

            runner = GpuRunner(built, cache, runtime, placement, gpu, hardware_of(bundle), advise)
            notices += [runner.notice] if runner.notice else []
        engine = cls(built, codec, runtime, placement, cache, runner)
        settings, ends = generation_defaults(folder.path)
        engine.settings, engine.end_tokens = settings, frozenset(ends or codec.eos_tokens())
        engine.notices = tuple(notices)
        runner.load_kernels()
        load_sampling_kernels()
        return engine

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
        tokens = self.codec.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self._stream(tokens, settings or self.settings, progress)

    def reply(
        self, messages: Sequence[Message], settings: SamplingSettings | None = None
    ) -> Generator[GenerationStep, None, None]:
        """Answer a conversation. Keys and values of what it shares with the last call are reused."""
        return self._stream(self.codec.encode_chat(messages), settings or self.settings, None)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Length of the prompt that `reply` would make of `messages`."""
        return len(self.codec.encode_chat(messages))

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
        where = "" if isinstance(self.runner, CpuRunner) else "\nThe hot neurons are on the GPU."
        return f"{self.placement.table()}{where or NO_GPU}"

    def _stream(
        self, tokens: list[int], settings: SamplingSettings, progress: Callable[[int, int], None] | None
    ) -> Generator[GenerationStep, None, None]:
        self._check_prompt(tokens)
        return self._answer_of(tokens, settings, progress or (lambda done, total: None))

    def _check_prompt(self, tokens: list[int]) -> None:
        if not tokens:
            raise InputError("the prompt is empty, expected at least one token; write something")
        if len(tokens) >= self.context:
            raise ContextError(
                f"prompt of {len(tokens)} tokens leaves no room in a context of {self.context}; "
                "shorten it, or raise --context if the model allows"
            )
        top = self.model.spec.vocab_size
        if min(tokens) < 0 or max(tokens) >= top:
            raise InputError(f"token ids must be 0 to {top - 1}, got {min(tokens)} to {max(tokens)}")

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
        sampler, text = Sampler(settings), AnswerText(self.codec, settings.stop, tokens[-_CONTEXT_TOKENS:])
        logits, reused = self._prefill(tokens, progress)
        self.runtime.counters = FFNCounters()
        seen, first = list(tokens), 0.0
        token = sampler.pick(logits, seen)
        for count in range(1, settings.max_new_tokens + 1):
            seen.append(token)
            now = perf_counter()
            first = first or now
            piece, finish = (
                text.push(token, ended=token in self.end_tokens),
                self._finish(text, token, seen, count, settings),
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
        if sampler.takes_largest:
            following = self.runner.greedy(seen[-1])
        else:
            following = sampler.pick(self.runner.decode(seen[-1]), seen)
        self._cached_tokens.append(seen[-1])
        return following

    def _finish(
        self, text: AnswerText, token: int, seen: list[int], count: int, settings: SamplingSettings
    ) -> FinishReason | None:
        if text.stopped or token in self.end_tokens:
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
            logits = self.runner.read(piece)
            self._cached_tokens += piece
        progress(len(tokens) - reused, len(tokens) - reused)
        return logits, reused

    def _stats(self, prompt: int, reused: int, count: int, ttft: float, decode: float) -> GenerationStats:
        counters = self.runtime.counters
        return GenerationStats(
            prompt_tokens=prompt,
            cached_tokens=reused,
            generated_tokens=count,
            ttft_seconds=ttft,
            decode_seconds=decode,
            active_share=counters.computed / counters.neurons if counters.neurons else None,
            hot_share=counters.fired_hot / counters.fired if counters.fired else None,
            predictor_seconds=counters.predictor_seconds,
            attention_seconds=counters.attention_seconds,
            ffn_seconds=counters.ffn_seconds,
            head_seconds=counters.head_seconds,
        )


class AnswerText:
    """Tokens to text that may be shown: whole characters, nothing from a stop string on."""

    def __init__(self, codec: TextCodec, stop: Sequence[str], before: Sequence[int]) -> None:
        """`before`: the tokens that the answer follows."""
        self._decoder, self._stop, self._held = StreamDecoder(codec, before), stop, ""
        self.stopped = False

    def push(self, token: int, ended: bool) -> str:
        """Text to show now that `token` came; an end token has none."""
        return "" if ended else self._release(self._decoder.push(token))

    def rest(self) -> str:
        """What is still held back when the answer ends."""
        shown = "" if self.stopped else self._release(self._decoder.flush())
        rest, self._held = ("" if self.stopped else self._held), ""
        return shown + rest

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # Hold back an ending that may be the start of a stop string.
        keep = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def cpu_threads(beside_gpu: bool) -> int:
    """All CPUs, but beside a GPU leave one in eight, at least one: for the caller, which waits for the GPU, and others.

    On 16 cores 14 threads took 6.47 ms a token, 15 took 6.62, 12 6.50 and 10 6.96 (7B bf16, 8 GiB).
    """
    cpus = available_cpus()
    return max(1, cpus - max(1, cpus // 8)) if beside_gpu else cpus


def choose_strategy(sparsity: str, activation: str, fires_sparsely: bool) -> Strategy:
    """The strategy that `sparsity` means for a model. Raises `InputError` for a sparse one where nothing is sparse."""
    if sparsity == "auto":
        return "learned" if fires_sparsely else "dense"
    for strategy in STRATEGIES:
        if strategy == sparsity:
            if strategy != "dense" and not fires_sparsely:
                raise InputError(f"{activation} fires densely, so --sparsity {sparsity} has no meaning; use dense")
            return strategy
    raise InputError(f"unknown sparsity {sparsity!r}, expected auto, {', '.join(STRATEGIES)}")
