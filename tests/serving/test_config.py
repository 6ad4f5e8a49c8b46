"""What a serving configuration may say, and how large the KV pool is."""

from types import SimpleNamespace

import pytest
import torch
from placement_cases import small_spec

from hybrid import EngineConfig, ServingConfig
from hybrid.errors import InputError
from hybrid.serving.config import pool_tokens

SPEC = small_spec(n_layers=2)  # 2 x 32 bytes a token


def plan(kv_tokens=None, gpu=None, context=64):
    return SimpleNamespace(spec=SPEC, kv_tokens=kv_tokens, gpu=gpu, context=context)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kv_tokens": 0}, "kv_tokens is 0, expected a whole number, 1 to"),
        ({"max_running": True}, "max_running is True, expected a whole number"),
        ({"max_waiting": 1.5}, r"max_waiting is 1\.5, expected a whole number"),
        ({"max_pause": 0}, "max_pause is 0, expected seconds, more than 0, at most 3600"),
        ({"max_pause": float("nan")}, "max_pause is nan"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(InputError, match=message) as caught:
        ServingConfig(**values)
    assert caught.value.setting == next(iter(values))


def test_an_engine_refuses_no_tokens_too():
    with pytest.raises(InputError, match="kv_tokens is 0, expected a whole number of tokens, 1 to"):
        EngineConfig(kv_tokens=0)


def test_on_the_cpu_a_quarter_of_the_free_memory():
    assert SPEC.n_layers * SPEC.kv_bytes_per_layer(1) == 64
    assert pool_tokens(ServingConfig(), plan(), free=4 * 64 * 1000) == 1000
    assert pool_tokens(ServingConfig(), plan(), free=0) == 64  # one context
    assert pool_tokens(ServingConfig(max_running=3), plan(), free=2**40) == 3 * 64
    assert pool_tokens(ServingConfig(kv_tokens=7), plan(), free=2**40) == 7


def test_beside_a_gpu_what_was_planned():
    gpu = torch.device("cuda")
    assert pool_tokens(ServingConfig(), plan(gpu=gpu)) == 64
    assert pool_tokens(ServingConfig(), plan(kv_tokens=500, gpu=gpu)) == 500
