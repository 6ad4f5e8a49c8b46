"""What engines share of an answer: whether its prompt is one, its text as it may be shown, its statistics."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.errors import ContextError, InputError
from hybrid.formats.text import StreamDecoder, TextCodec
from hybrid.generation import GenerationStats
from hybrid.model.ffn import FFNCounters

_CONTEXT_TOKENS = 8  # of the prompt, that a decoder may need to see: some drop the space of a text's first word


def check_prompt(tokens: Sequence[int], context: int, vocab: int) -> None:
    """Raises `InputError` for no tokens or such that there are none of, `ContextError` where no room is left to answer
    in a context of so many."""
    if not tokens:
        raise InputError("the prompt is empty, expected at least one token; write something")
    if len(tokens) >= context:
        raise ContextError(
            f"prompt of at least {len(tokens)} tokens leaves no room in a context of {context}; "
            "shorten it, or raise the context if the model allows",
            setting="context",
        )
    if min(tokens) < 0 or max(tokens) >= vocab:
        raise InputError(f"token ids must be 0 to {vocab - 1}, got {min(tokens)} to {max(tokens)}")


def answer_stats(
    counters: FFNCounters, on_gpu: bool, prompt: int, cached: int, generated: int, ttft: float, decode: float
) -> GenerationStats:
    """Statistics of an answer by the counters of its decode steps; on_gpu: whether a GPU serves hot neurons."""
    return GenerationStats(
        prompt_tokens=prompt,
        cached_tokens=cached,
        generated_tokens=generated,
        ttft_seconds=ttft,
        decode_seconds=decode,
        active_share=counters.computed / counters.neurons if counters.neurons else None,
        hot_share=counters.fired_hot / counters.fired if counters.fired and on_gpu else None,
        predictor_seconds=counters.predictor_seconds,
        attention_seconds=counters.attention_seconds,
        ffn_seconds=counters.ffn_seconds,
        head_seconds=counters.head_seconds,
    )


class AnswerText:
    """Tokens to text that may be shown: whole characters, nothing from a stop string on."""

    def __init__(self, codec: TextCodec, stop: Sequence[str], before: Sequence[int]) -> None:
        """`before`: the tokens that the answer follows, or the last of them."""
        self._decoder, self._stop, self._held = StreamDecoder(codec, before[-_CONTEXT_TOKENS:]), stop, ""
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
        starts = (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        keep = max(starts, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
