"""The low-rank predictor on the GPU, against its reference and the CPU's."""

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, assert_close, random_input

from cpu_kernels import low_rank as on_cpu
from cpu_kernels.contract import padded
from cpu_kernels.worker_pool import WorkerPool
from gpu_kernels.gemv import Tiling
from gpu_kernels.low_rank import DevicePredictorView, PredictorTiling, predict, predict_ref


def _parts(d: int, r: int, f: int, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    fc1 = torch.randint(-127, 128, (r, d), generator=draw, dtype=torch.int8)
    fc2 = torch.randint(-127, 128, (f, r), generator=draw, dtype=torch.int8)
    s1, b1 = torch.rand(r, generator=draw) / (70 * d**0.5), torch.randn(r, generator=draw) / 4
    s2, b2 = torch.rand(f, generator=draw) / (70 * r**0.5), torch.randn(f, generator=draw) / 4
    return fc1, s1, b1, fc2, s2, b2


def _outputs(view: DevicePredictorView, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Filled with what no kernel writes, so that a gap shows."""
    hidden = torch.full((tokens, len(view.b1)), torch.nan, device=DEVICE)
    return hidden, torch.full((len(view.b2),), -1, dtype=torch.int32, device=DEVICE)


def _clear_threshold(view: DevicePredictorView, x: torch.Tensor) -> float:
    """In the widest gap of the middle half of all scores, so that rounding moves none across."""
    hidden = torch.relu(x @ view.fc1[:, : view.d].float().T * view.s1 + view.b1)
    scores = (hidden @ view.fc2[:, : hidden.shape[1]].float().T * view.s2 + view.b2).flatten().sort().values
    middle = scores[len(scores) // 4 : 3 * len(scores) // 4 + 2]
    at = int(middle.diff().argmax()) if len(middle) > 1 else 0
    return float(middle[at : at + 2].mean())


@pytest.mark.parametrize(
    ("tokens", "d", "r", "f"),
    [
        (1, 1, 1, 1),
        (1, 129, 17, 300),
        (1, 300, 130, 129),
        (8, 1, 1, 1),
        (8, 129, 17, 31),
        (3, 300, 33, 17),
        (32, 129, 17, 31),
    ],
)
def test_equals_reference(tokens, d, r, f):
    parts, x = _parts(d, r, f), random_input(tokens, d)
    threshold = _clear_threshold(DevicePredictorView.of(*parts, 0.0, DEVICE), x)
    view = DevicePredictorView.of(*parts, threshold, DEVICE)
    hidden, masks = _outputs(view, tokens)
    predict(view, x, hidden, masks)
    expected_hidden, expected = _outputs(view, tokens)
    predict_ref(view, x, expected_hidden, expected)
    assert_close(hidden, expected_hidden)
    assert torch.equal(masks, expected)
    assert f == 1 or 0 < int((masks & 1).sum()) < f


def test_every_code_is_exact():
    """One column at a time, with all codes of -128 to 127 at each place of a word."""
    codes = torch.arange(-128, 128).to(torch.int8)[:, None].repeat(1, 4)
    ones, one = torch.ones(256), torch.ones(1)
    view = DevicePredictorView.of(codes, ones, ones * 128, torch.zeros(1, 256, dtype=torch.int8), one, one, 0.0, DEVICE)
    hidden, masks = _outputs(view, 4)
    predict(view, torch.eye(4, device=DEVICE), hidden, masks, PredictorTiling(Tiling(16, 1, 1), Tiling(1, 1, 1)))
    assert hidden.tolist() == [list(range(256))] * 4


@pytest.mark.parametrize("tiling", [Tiling(1, 1, 1), Tiling(4, 2, 4)])
def test_other_tilings(tiling):
    parts, x = _parts(260, 20, 40), random_input(2, 260)
    view = DevicePredictorView.of(*parts, _clear_threshold(DevicePredictorView.of(*parts, 0.0, DEVICE), x), DEVICE)
    found, expected = _outputs(view, 2), _outputs(view, 2)
    predict(view, x, *found, PredictorTiling(tiling, tiling))
    predict_ref(view, x, *expected)
    assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_more_columns_than_a_tile():
    parts, x = _parts(4200, 9, 3), random_input(2, 4200)
    view = DevicePredictorView.of(*parts, _clear_threshold(DevicePredictorView.of(*parts, 0.0, DEVICE), x), DEVICE)
    found, expected = _outputs(view, 2), _outputs(view, 2)
    predict(view, x, *found)
    predict_ref(view, x, *expected)
    assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_token_has_the_same_bits_however_many_there_are():
    view, x = DevicePredictorView.of(*_parts(129, 17, 31), 0.1, DEVICE), random_input(32, 129)
    hidden, masks = _outputs(view, 32)
    predict(view, x, hidden, masks)
    for t in (0, 9, 31):
        alone, bits = _outputs(view, 1)
        predict(view, x[t : t + 1], alone, bits)
        assert torch.equal(alone[0], hidden[t]) and torch.equal(bits, (masks >> t) & 1)
        assert 0 < int(bits.sum()) < 31


@pytest.mark.parametrize(("threshold", "mask"), [(float("inf"), 0), (float("-inf"), 7)])
def test_none_and_all_fire(threshold, mask):
    view = DevicePredictorView.of(*_parts(17, 5, 33), threshold, DEVICE)
    hidden, masks = _outputs(view, 3)
    predict(view, random_input(3, 17), hidden, masks)
    assert masks.tolist() == [mask] * 33


def test_a_score_at_the_threshold_fires():
    ones = torch.ones(1)
    view = DevicePredictorView.of(
        torch.ones(1, 1, dtype=torch.int8), ones, ones * 0, torch.ones(1, 1, dtype=torch.int8), ones, ones, 3.0, DEVICE
    )
    hidden, masks = _outputs(view, 2)
    predict(view, torch.tensor([[2.0], [1.999]], device=DEVICE), hidden, masks)
    assert masks.tolist() == [1]


def test_agrees_with_the_cpu():
    parts, x = _parts(256, 40, 100), random_input(1, 256)
    threshold = _clear_threshold(DevicePredictorView.of(*parts, 0.0, DEVICE), x)
    view = DevicePredictorView.of(*parts, threshold, DEVICE)
    hidden, masks = _outputs(view, 1)
    predict(view, x, hidden, masks)
    rows = np.empty(100, np.int32)
    count = on_cpu.predict_rows(on_cpu.PredictorView.of(*parts, threshold), x[0].cpu().numpy(), rows, WorkerPool(1))
    assert rows[:count].tolist() == masks.nonzero()[:, 0].tolist()


def test_view_refuses_codes_that_are_not_padded():
    fc1, s1, b1, fc2, s2, b2 = (part.to(DEVICE) for part in _parts(17, 5, 33))
    assert DevicePredictorView.of(fc1, s1, b1, fc2, s2, b2, 0.0, DEVICE).fc2.shape == (33, padded(5))
    with pytest.raises(ValueError, match=r"fc1 .*\(5, 128\), got torch.int8 \(5, 17\)"):
        DevicePredictorView(fc1, s1, b1, fc2, s2, b2, 0.0, 17)


def test_refuses_wrong_shapes_and_types():
    view = DevicePredictorView.of(*_parts(17, 5, 33), 0.0, DEVICE)
    hidden, masks = _outputs(view, 2)
    with pytest.raises(ValueError, match="1 to 4 tokens, or a multiple of 4 up to 32, got 10"):
        predict(view, random_input(10, 17), *_outputs(view, 10))
    with pytest.raises(ValueError, match=r"x \(2, 17\)"):
        predict(view, random_input(2, 18), hidden, masks)
    with pytest.raises(ValueError, match="hidden"):
        predict(view, random_input(1, 17), hidden, masks)
    with pytest.raises(ValueError, match="int32 masks"):
        predict(view, random_input(2, 17), hidden, masks.to(torch.uint8))
