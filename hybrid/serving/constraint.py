"""`Constraints`: what an answer must look like, token by token, by a grammar: JSON, JSON of a schema, a call of a tool.

The work is `llguidance`'s (extra `serve`). What may follow a token is found out on a thread of its own from the moment
that the token is accepted, while the step of the next one runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from hybrid.errors import InputError
from profiler.common.errors import shown

_THREADS = 2
# Between JSON's parts: nothing, a space, or a new line and its indent. A model may go on with any white space for ever.
_SPACE = r"( |\n[ \t]{0,20})?"


class Constraints:
    """Makes constraints for one model's tokens. One for each model, as reading the tokenizer may take a second."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, end_tokens: Iterable[int]) -> None:
        """vocab: embeddings of the model. Raises `InputError` where llguidance is not installed, or cannot use the
        tokenizer: its decoder must be of bytes, or SentencePiece's with bytes to fall back to."""
        try:
            import llguidance
        except ModuleNotFoundError as error:
            problem = "answers of a given form need the package llguidance: pip install hybrid-inference[serve]"
            raise InputError(problem) from error
        ends = sorted(end_tokens)
        if not ends:
            raise InputError("answers of a given form need an end token, and the model's files name none")
        self._matcher, self._vocab = llguidance.LLMatcher, vocab
        known = tokenizer.get_vocab_size(with_added_tokens=True)
        try:
            self._tokens = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=max(vocab, known), eos_token=ends)
        except ValueError as error:
            raise InputError(f"llguidance cannot use this model's tokenizer: {_line(str(error))}") from error
        self._threads = ThreadPoolExecutor(_THREADS, "hybrid-masks")

    def json_object(self) -> GrammarConstraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | bool) -> GrammarConstraint:
        """JSON that `schema` describes. Raises `InputError` for a schema that is none, or has what llguidance does not
        know."""
        try:
            grammar = self._matcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_pattern": _SPACE})
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"the schema {shown(schema)} cannot be used: {_line(str(error))}") from error
        return self._constraint(grammar, "schema")

    def tool_call(self, tools: Mapping[str, Mapping[str, Any]]) -> GrammarConstraint:
        """A call of one of `tools`, the schemas of their arguments by name: {"name": ..., "arguments": {...}}."""
        if not tools:
            raise InputError("there is no tool to call, expected at least one")
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": schema},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, schema in tools.items()
        ]
        return self.json_schema(calls[0] if len(calls) == 1 else {"anyOf": calls})

    def grammar(self, lark: str) -> GrammarConstraint:
        """Text of a grammar in llguidance's form of Lark, for text around JSON. Raises `InputError` for one that is
        none."""
        return self._constraint(self._matcher.grammar_from_lark(lark), "grammar")

    def close(self) -> None:
        """End the threads; constraints that were made take no more tokens."""
        self._threads.shutdown(cancel_futures=True)

    def _constraint(self, grammar: str, what: str) -> GrammarConstraint:
        matcher = self._matcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"the {what} cannot be used: {_line(matcher.get_error())}")
        return GrammarConstraint(matcher, self._vocab, self._threads)


class _Next(NamedTuple):
    """What may follow: a mask bool [vocab], and whether that is an end token only."""

    allowed: np.ndarray
    finished: bool


class GrammarConstraint:
    """A `Constraint` by an llguidance matcher, for one answer."""

    def __init__(self, matcher: Any, vocab: int, threads: ThreadPoolExecutor) -> None:
        self._matcher, self._vocab, self._threads = matcher, vocab, threads
        self._next: Future[_Next] = threads.submit(self._after, None)

    def allowed(self) -> np.ndarray:
        """A mask bool [vocab]; waits for it. Raises `InputError` where the grammar grew too large, or a token before
        was not allowed."""
        return self._next.result().allowed

    def accept(self, token: int) -> None:
        """`token` came next."""
        self._next.exception()  # wait for it: one thread at a time
        self._next = self._threads.submit(self._after, token)

    @property
    def is_finished(self) -> bool:
        return self._next.result().finished

    def _after(self, token: int | None) -> _Next:
        matcher = self._matcher
        if token is not None:
            matcher.consume_token(token)
        stopped = not matcher.is_error() and matcher.stop_reason() == "EndOfSentence"
        if stopped:
            return _Next(np.zeros(self._vocab, bool), True)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise InputError(f"the answer's form cannot be kept: {_line(matcher.get_error())}")
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab].astype(bool)
        return _Next(mask, matcher.is_stopped())


def _line(text: str) -> str:
    """A library's message on one line, without what it says of its state."""
    return " ".join(text.partition("<state>")[0].split())[:300]
