"""llama.cpp beside this engine: the same prompt, token count and threads, greedy, timed token by token.

Its low-level calls are used, and the largest logit is taken with NumPy, so that no Python sampling is held against it.
Threads: llama.cpp's own wait a moment after each call and then sleep, so they cost nothing while the other side runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from hybrid.errors import InputError
from profiler.common.spec import ModelSpec


@dataclass(frozen=True)
class GreedyRun:
    """One greedy answer: its tokens, seconds from the call to the first token, and between each token and the next."""

    prompt_tokens: int
    tokens: tuple[int, ...]
    ttft: float
    intervals: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first, over the time since the first."""
        return len(self.intervals) / sum(self.intervals)


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, memory-mapped."""

    name = "llama.cpp"

    def __init__(self, path: Path, threads: int, context: int) -> None:
        """Raises `InputError` when llama-cpp-python is not installed or the file cannot be loaded."""
        try:
            import llama_cpp
        except ImportError as error:
            raise InputError("--peer llama.cpp needs llama-cpp-python; pip install hybrid-inference[peers]") from error
        if not path.is_file():
            raise InputError(f"{path} is not a file; give the model's GGUF as --peer-model (scripts/gguf_model.py)")
        self._api: Any = llama_cpp
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        try:
            self._model = llama_cpp.Llama(
                str(path),
                n_gpu_layers=0,
                use_mmap=True,
                n_ctx=context,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except ValueError as error:
            raise InputError(f"llama.cpp cannot load {path}: {error}; write it with scripts/gguf_model.py") from error

    def refuse_other_shape(self, spec: ModelSpec) -> None:
        """Raise `InputError` unless the file's model is as large as that of `spec`."""
        model = self._model.model
        theirs = {
            "layers": self._api.llama_model_n_layer(model),
            "d_model": self._model.n_embd(),
            "vocabulary": self._model.n_vocab(),
            "heads": self._api.llama_model_n_head(model),
            "d_ff": int(self._model.metadata.get("llama.feed_forward_length", spec.d_ff)),
        }
        ours = (spec.n_layers, spec.d_model, spec.vocab_size, spec.n_heads, spec.d_ff)
        for (what, theirs_has), ours_has in zip(theirs.items(), ours, strict=True):
            if theirs_has != ours_has:
                raise InputError(
                    f"the peer's model has {what} {theirs_has}, this one {ours_has}; "
                    "write its GGUF with scripts/gguf_model.py"
                )

    def generate(self, prompt: Sequence[int], count: int) -> GreedyRun:
        """Read `prompt` from the start and continue it by `count` tokens, whatever they are."""
        self._model.reset()
        start = perf_counter()
        self._model.eval(prompt)
        tokens, times = [self._largest()], [perf_counter()]
        while len(tokens) < count:
            self._model.eval(tokens[-1:])
            tokens.append(self._largest())
            times.append(perf_counter())
        return GreedyRun(len(prompt), tuple(tokens), times[0] - start, tuple(np.diff(times).tolist()))

    def close(self) -> None:
        self._model.close()

    def _largest(self) -> int:
        logits = self._api.llama_get_logits_ith(self._model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self._model.n_vocab(),)).argmax())
