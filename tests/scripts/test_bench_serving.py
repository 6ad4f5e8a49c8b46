"""`bench_serving.py`: what callers met is counted right, requests come as often as asked, and both measurements run."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner


@pytest.fixture
def bench(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    import bench_serving

    return bench_serving


def test_what_callers_met_by_hand(bench):
    met = [bench.Met([0.1, 0.15, 0.35]), bench.Met([3.0]), bench.Met(failed="full")]
    assert (met[0].ttft, met[0].tpot, met[0].longest_gap) == pytest.approx((0.1, 0.125, 0.2))
    assert (met[1].tpot, met[1].longest_gap) == (0, 0)
    found = bench.summary(met)
    assert (found["requests"], found["failed"], found["goodput"]) == (3, 1, 0)
    assert (found["ttft_p50_ms"], found["longest_gap_ms"]) == (1550, 200)
    assert bench.summary([bench.Met([0.1, 0.15])])["goodput"] == 1


def test_requests_are_of_all_lengths_and_the_same_for_a_seed(bench):
    made = bench.requests(100, 16, 1500, 5, 3)
    lengths = [len(next(made).prompt) for _ in range(400)]
    assert min(lengths) >= 16 and max(lengths) <= 1500
    assert np.median(lengths) == pytest.approx(155, rel=0.2)  # the root of 16 x 1500
    assert len(next(bench.requests(100, 16, 1500, 5, 3)).prompt) == lengths[0]


def test_arrivals_come_as_often_as_asked(bench):
    async def count():
        return len([None async for _ in bench.arrivals(1000, 0.3, 1)])

    assert asyncio.run(count()) == pytest.approx(300, abs=60)


def test_the_longest_pause_is_that_of_the_load(bench, monkeypatch):
    """Not of the capacity before it, whose own is told beside it."""
    state = SimpleNamespace(pause=0.0, preempted=0)

    def figures():
        return SimpleNamespace(longest_pause_seconds=state.pause, preempted_total=state.preempted, kv_blocks_used=0)

    async def capacity(engine, asked, seconds):
        state.pause, state.preempted = 0.9, 3
        return 100.0

    async def ask(engine, request):
        state.pause, state.preempted = max(state.pause, 0.2), 5
        return bench.Met([0.1, 0.2])

    monkeypatch.setattr(bench, "capacity", capacity)
    monkeypatch.setattr(bench, "ask", ask)
    engine = SimpleNamespace(
        context=100,
        plan=SimpleNamespace(spec=SimpleNamespace(vocab_size=100)),
        figures=figures,
        restart_longest_pause=lambda: setattr(state, "pause", 0.0),
    )
    found = asyncio.run(bench.load(engine, 1.0, 0.2, 2, 0))
    assert found["requests"] > 0 and found["preempted"] == 2
    assert (found["longest_pause_ms"], found["longest_pause_of_capacity_ms"]) == (200, 900)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["batches", "--sequences", "1,2", "--tokens", "4"], "tokens_per_second"),
        (["load", "--seconds", "0.3", "--tokens", "2", "--share", "0.2"], "longest_gap_ms"),
        (["prefix", "--tokens", "80"], "next_turn_share"),
    ],
)
def test_it_runs(bench, arguments, name):
    done = CliRunner().invoke(bench.main, ["--threads", "1", "--max-running", "2", "--kv-tokens", "2048", *arguments])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output.splitlines()[-1])
    assert name in found and found.get("failed", 0) == found.get("kv_blocks_used", 0) == 0
