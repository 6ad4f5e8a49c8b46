"""The load script against a server over a fake engine: its figures, what it counts as failed, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from server_cases import running, service_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "load_server.py"


def load(url, *options):
    """Exit code and figures."""
    command = [sys.executable, str(SCRIPT), "--url", url, "--answers", "4", "8", "--prompts", "16", "100", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_random_arrivals():
    engine = FakeEngine("word " * 50)
    with running(service_of(engine)) as url:
        code, found = load(url, "--rate", "40", "--minutes", "0.02")
    assert (code, found["failed"], found["left_behind"]) == (0, 0, {})
    assert found["requests"] == len(engine.requests) == engine.finished > 20
    assert all(16 <= len(request.prompt) <= 100 and request.logit_bias == {1: -100} for request in engine.requests)
    assert all(4 <= request.settings.max_new_tokens <= 8 for request in engine.requests)
    assert 0 < found["ttft_p50"] <= found["ttft_p90"] <= found["ttft_p99"]
    assert found["good_share"] == 1 and found["tokens_per_second"] > 4 * found["requests_per_second"]


def test_clients_that_vanish_leave_nothing():
    engine = FakeEngine("word " * 50, pause=0.02)
    with running(service_of(engine)) as url:
        code, found = load(url, "--vanish", "30", "--answers", "40", "50")
    assert (code, found["requests"], found["failed"]) == (0, 30, 0)
    assert (engine.open, engine.finished) == (0, 0)


def test_what_is_refused_is_a_failure():
    with running(service_of(FakeEngine(most=0))) as url:
        code, found = load(url, "--at-once", "2", "--minutes", "0.001")
    assert (code, found["failures"]) == (1, {"429 Too Many Requests": found["requests"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "http://192.0.2.1:80", "--rate", "1"], "is not on this machine"),
        (["--rate", "1", "--minutes", "61"], "at most 60 minutes"),
    ],
)
def test_no_other_machine_and_no_end(options, message):
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and message in done.stderr
