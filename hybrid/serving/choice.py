"""`RowChoice`: how the next token of one request is chosen, and what is noted of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from hybrid.errors import InputError
from hybrid.runtime.sampling import Sampler, penalise
from hybrid.serving.request import Request, TokenLogprob
from profiler.common.openmp import torch_threads


class RowChoice:
    """A `Choice` as a request asks, with draws of its own.

    Where it asks for settings alone it is a `Sampler`, which a runner need not bring logits to the host for. Otherwise
    they are adjusted first, in this order: repetition penalty, frequency and presence penalty, biases, the constraint.
    logprob: of the token that was picked last, where they are asked for. failure: why the constraint takes no token
    any more; the token picked then means nothing.
    """

    def __init__(self, request: Request, seen: Sequence[int]) -> None:
        """seen: prompt, and answer so far; a list that grows."""
        self.settings, self._request, self._seen = request.settings, request, seen
        self._counted, self._counts = len(seen), Counter[int]()
        penalties = request.frequency_penalty or request.presence_penalty
        constrained = request.constraint is not None
        self._adjusts = bool(penalties or request.logit_bias or constrained)
        settings = replace(request.settings, repetition_penalty=1.0) if self._adjusts else request.settings
        self._sampler = Sampler(settings, seen)
        self.logprob: TokenLogprob | None = None
        self.failure: InputError | None = None

    @property
    def takes_largest(self) -> bool:
        return self._is_plain and self._sampler.takes_largest

    @property
    def draws_from_few(self) -> bool:
        return self._is_plain and self._sampler.draws_from_few

    @property
    def _is_plain(self) -> bool:
        return not self._adjusts and self._request.top_logprobs is None

    def uniform(self) -> float:
        return self._sampler.uniform()

    @torch_threads(1)
    def pick(self, logits: torch.Tensor, *, uniform: float | None = None) -> int:
        """As `Choice.pick`; `logits` are not changed."""
        try:
            token = self._sampler.pick(self._adjusted(logits) if self._adjusts else logits, uniform=uniform)
            if self._request.constraint is not None:
                self._request.constraint.accept(token)
        except InputError as error:
            self.failure = error
            return 0
        if self._request.top_logprobs is not None:
            self.logprob = token_logprob(logits, token, self._request.top_logprobs)
        return token

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        request, penalty = self._request, self._request.settings.repetition_penalty
        found = penalise(logits, self._seen, penalty) if penalty != 1 and self._seen else logits.clone()
        self._counts.update(self._seen[self._counted :])
        self._counted = len(self._seen)
        if self._counts and (request.frequency_penalty or request.presence_penalty):
            ids, counts = torch.tensor(list(self._counts)), torch.tensor(list(self._counts.values()))
            found[ids] -= request.frequency_penalty * counts + request.presence_penalty
        if request.logit_bias:
            found[torch.tensor(list(request.logit_bias))] += torch.tensor(list(request.logit_bias.values()))
        if request.constraint is not None:
            allowed = torch.from_numpy(request.constraint.allowed())
            if not bool(allowed.any()):
                raise InputError("no token can follow that the constraint on the answer allows")
            found[: len(allowed)].masked_fill_(~allowed[: len(found)], -torch.inf)
        return found


def token_logprob(logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """What `logits` [vocab] f32 say of `token`, and of the `top` likeliest."""
    values = logits.log_softmax(0)
    largest = values.topk(min(top, len(values)))
    pairs = zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
    return TokenLogprob(token, float(values[token]), tuple(pairs))
