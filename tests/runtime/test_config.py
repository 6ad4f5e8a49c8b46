"""What an engine's configuration takes and refuses, in words for whoever calls it from Python."""

from pathlib import Path

import numpy as np
import pytest

from hybrid import EngineConfig
from hybrid.errors import InputError
from placement.plan import UNLIMITED


def test_sizes_and_paths_may_be_text():
    config = EngineConfig(vram_budget="8GiB", bundle="artefacts")
    assert (config.vram_budget, config.bundle) == (8 * 2**30, Path("artefacts"))
    assert EngineConfig(vram_budget="unlimited").vram_budget == UNLIMITED
    assert EngineConfig() == EngineConfig(vram_budget=None, bundle=None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparsity": "half"}, "unknown sparsity 'half', expected auto, dense, exact, learned"),
        ({"kv": "f16"}, "unknown kv 'f16', expected auto or int8"),
        ({"prefill": "slow"}, "unknown prefill 'slow', expected auto, fast, precise"),
        ({"sparsity": None}, "unknown sparsity None"),
        ({"context": 0}, "context is 0, expected a whole number of tokens, at least 1"),
        ({"context": 10.5}, r"context is 10\.5, expected a whole number"),
        ({"context": "10"}, "context is '10', expected a whole number"),
        ({"context": True}, "context is True, expected a whole number"),
        ({"threads": 0}, "threads is 0, expected a whole number, 1 to 1024"),
        ({"threads": "2"}, "threads is '2', expected a whole number"),
        ({"threads": np.float32(2)}, "threads is .*2.*, expected a whole number"),
        ({"bundle": 3}, "bundle is 3, expected the path of a folder"),
        ({"bundle": ""}, "bundle is '', expected the path of a folder"),
        ({"vram_budget": -1}, "VRAM budget is -1, expected bytes from 0 to 1 PiB, or a size such as '8GiB'"),
        ({"vram_budget": 1e9}, r"VRAM budget is 1000000000\.0, expected bytes"),
        ({"vram_budget": True}, "VRAM budget is True, expected bytes"),
        ({"vram_budget": "lots"}, "'lots' is not a size; expected a size such as 8GiB"),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(InputError, match=message) as error:
        EngineConfig(**config)
    assert "--" not in str(error.value)
