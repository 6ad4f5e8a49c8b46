"""Picking the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrid.generation import SamplingSettings


class Sampler:
    """Draws tokens as `settings` say; the same seed and logits give the same tokens.

    Filters apply in the order of Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p.
    """

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    def pick(self, logits: torch.Tensor, seen: Sequence[int]) -> int:
        """The next token for `logits` [vocab] f32; `seen` are prompt and answer so far, for the repetition penalty."""
        settings = self._settings
        if settings.repetition_penalty != 1 and seen:
            logits = _penalise(logits, seen, settings.repetition_penalty)
        if settings.greedy:
            return int(logits.argmax())
        probabilities = filtered_probabilities(logits, settings)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def filtered_probabilities(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Probabilities [vocab] after temperature, top-k, top-p and min-p; the most likely token always stays."""
    scaled, order = (logits / settings.temperature).sort(descending=True, stable=True)
    if settings.top_k:
        scaled[settings.top_k :] = -torch.inf
    if settings.top_p < 1:
        probabilities = scaled.softmax(0)
        before = probabilities.cumsum(0) - probabilities
        scaled[before >= settings.top_p] = -torch.inf
    if settings.min_p > 0:
        probabilities = scaled.softmax(0)
        scaled[probabilities < settings.min_p * probabilities[0]] = -torch.inf
    return torch.zeros_like(scaled).scatter_(0, order, scaled.softmax(0))


def _penalise(logits: torch.Tensor, seen: Sequence[int], penalty: float) -> torch.Tensor:
    """CTRL's penalty (arXiv 1909.05858): seen tokens' logits are divided when positive, multiplied when negative."""
    ids = torch.tensor(sorted(set(seen)))
    scores = logits[ids]
    return logits.index_put((ids,), torch.where(scores > 0, scores / penalty, scores * penalty))
