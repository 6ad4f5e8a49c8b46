"""Drawing a token on the GPU: with the same seed, the tokens of the host's sampler, whatever the settings."""

import pytest
import torch
from gpu_cases import DEVICE, random_input
from model_cases import make_model
from step_cases import load_engine, use_references

from hybrid import SamplingSettings
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.sampler import DeviceSampler
from hybrid.runtime.sampling import Sampler

pytest.importorskip("transformers")
SETTINGS = [
    {"top_k": 5},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
    {"top_k": 0, "top_p": 0.6},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.1},  # from the whole vocabulary, in its own order: the host draws
    {"top_k": 2000, "top_p": 0.9},  # more than the GPU keeps: the host draws
    {"top_k": 0, "top_p": 1.0, "min_p": 0.0},  # from the whole vocabulary: the host draws
    {"top_k": 5, "repetition_penalty": 1.3},  # depends on what was seen: the host draws
]


class At(Sampler):
    """Draws by a given number; what the host picks is -1."""

    def __init__(self, point, **settings):
        super().__init__(SamplingSettings(**settings))
        self.point = point

    def uniform(self):
        return self.point

    def pick(self, logits, *, uniform=None):
        assert uniform == self.point
        return -1


def sampler_of(vocab, rows=1):
    counting = DeviceArena(torch.device(DEVICE))
    DeviceSampler(counting, "test", vocab, rows)
    return DeviceSampler(DeviceArena(torch.device(DEVICE), counting.used), "test", vocab, rows)


def finish():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def picked(sampler, logits, choices):
    host = torch.empty(tuple(logits.shape))
    sampler.queue(logits, choices, host)
    finish()
    return sampler.tokens(logits, choices, host)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("hybrid.model.kv_cache.BLOCK_SIZE", 8)
    use_references(monkeypatch)


@pytest.mark.parametrize(
    ("settings", "few"), list(zip(SETTINGS, [True, True, True, False, False, False, False], strict=True))
)
def test_what_is_drawn_from_the_largest_logits_only(settings, few):
    assert Sampler(SamplingSettings(**settings)).draws_from_few is few
    assert not Sampler(SamplingSettings(**settings | {"temperature": 0})).draws_from_few


def test_the_same_seed_gives_the_same_answer_on_both_devices(tmp_path):
    make_model("llama-relu", tmp_path)
    with load_engine(tmp_path) as ours, load_engine(tmp_path, gpu=False) as host:
        for number, change in enumerate(SETTINGS):
            settings = SamplingSettings(seed=number, max_new_tokens=8, **{"temperature": 1.5} | change)
            answers = [[step.token for step in engine.generate([1, 2, 3], settings)] for engine in (ours, host)]
            assert answers[0] == answers[1], change


@pytest.mark.parametrize("vocab", [7, 1500, 5000])
def test_a_nucleus_beyond_what_is_kept_is_left_to_the_host(vocab):
    """Flat logits: the 1024 largest hold less than top_p, unless they are all there is."""
    sampler = sampler_of(vocab)
    logits = torch.zeros(1, vocab, device=DEVICE)
    assert picked(sampler, logits, [At(0.5, temperature=1, top_k=0, top_p=0.95)]) == [3 if vocab == 7 else -1]
    logits[0, 5] = float("nan")
    assert picked(sampler, logits, [At(0.5, temperature=1, top_k=3, top_p=1)]) == [-1]


def test_each_row_is_chosen_in_its_own_way():
    """The largest, draws from few and from a nucleus, all of it by the host: each as alone, in the order of rows."""
    vocab = 3000
    logits = 2 * random_input(6, vocab)
    given = [
        {"temperature": 0}, {"temperature": 1.5, "top_k": 5}, {"temperature": 0.3, "top_k": 0, "top_p": 0.6},
        {"temperature": 1, "top_k": 0, "top_p": 1}, {"temperature": 0.9, "top_k": 9, "min_p": 0.1}, {"temperature": 0},
    ]  # fmt: skip
    settings, host = [SamplingSettings(seed=3, **change) for change in given], torch.empty(6, vocab)

    def chosen(rows):
        choices = [Sampler(settings[row]) for row in rows]
        sampler = sampler_of(vocab, len(rows))
        sampler.queue(logits[list(rows)], choices, host)
        finish()
        return sampler.tokens(logits[list(rows)], choices, host)

    together = chosen(range(6))
    assert together == [chosen([row])[0] for row in range(6)]
    assert together == [Sampler(s).pick(row.clone()) for s, row in zip(settings, logits.cpu(), strict=True)]
    assert chosen([5, 0]) == [together[5], together[0]]
    logits[5, 7] = float("nan")
    with pytest.raises(RuntimeError, match="not numbers"):
        chosen(range(6))
