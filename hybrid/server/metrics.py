"""An engine's figures as Prometheus reads them: llama.cpp's names where the meaning is the same, else ours."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hybrid.serving.figures import EngineFigures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Name, what it is, and the figure that it shows.
_COUNTERS = (
    ("llamacpp:prompt_tokens", "Prompt tokens processed.", "prompt_tokens_total"),
    ("llamacpp:prompt_seconds", "Prompt process time.", "prompt_seconds_total"),
    ("llamacpp:tokens_predicted", "Tokens generated.", "generated_tokens_total"),
    ("llamacpp:tokens_predicted_seconds", "Generation process time.", "generated_seconds_total"),
    ("llamacpp:n_decode", "Decode steps.", "steps_total"),
    ("hybrid:rows", "Rows of all decode steps.", "rows_total"),
    ("hybrid:requests", "Requests taken.", "requests_total"),
    ("hybrid:cancelled", "Requests whose client went away.", "cancelled_total"),
    ("hybrid:preempted", "Running requests set back to waiting.", "preempted_total"),
    ("hybrid:prefix_hit_tokens", "Prompt tokens whose keys and values were there.", "prefix_hit_tokens_total"),
    ("hybrid:cpu_wait_seconds", "Time that the GPU waited for the CPU.", "cpu_wait_seconds_total"),
)
_GAUGES = (
    ("llamacpp:requests_processing", "Requests processing.", "running"),
    ("llamacpp:requests_deferred", "Requests waiting.", "waiting"),
    ("hybrid:kv_blocks", "Blocks of the KV pool.", "kv_blocks"),
    ("hybrid:kv_blocks_used", "Blocks that answers hold.", "kv_blocks_used"),
    ("hybrid:kv_blocks_cached", "Blocks that are kept as known prefixes.", "kv_blocks_cached"),
    ("hybrid:hot_share", "Share of firings that hot neurons served.", "hot_share"),
    ("hybrid:active_share", "Share of FFN neurons that were computed.", "active_share"),
    (
        "hybrid:longest_pause_seconds",
        "Longest that reading a prompt held up others.",
        "longest_pause_seconds",
    ),
)
# Name, what it is, and the two figures whose quotient it shows.
_RATES = (
    ("llamacpp:prompt_tokens_seconds", "Prompt tokens/s.", "prompt_tokens_total", "prompt_seconds_total"),
    ("llamacpp:predicted_tokens_seconds", "Generated tokens/s.", "generated_tokens_total", "generated_seconds_total"),
    ("llamacpp:n_busy_slots_per_decode", "Rows per decode step.", "rows_total", "steps_total"),
)


def exposition(figures: EngineFigures) -> bytes:
    """The text of all metrics; figures that are None, as shares before the first token are, are left out."""
    registry = CollectorRegistry()
    registry.register(_Collector(figures))
    return generate_latest(registry)


class _Collector:
    def __init__(self, figures: EngineFigures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        for name, text, figure in _COUNTERS:
            yield CounterMetricFamily(name, text, getattr(self._figures, figure))
        for name, text, figure in _GAUGES:
            value = getattr(self._figures, figure)
            if value is not None:
                yield GaugeMetricFamily(name, text, value)
        for name, text, over, under in _RATES:
            below = getattr(self._figures, under)
            yield GaugeMetricFamily(name, text, getattr(self._figures, over) / below if below else 0.0)
