"""Hand-offs between GPU and CPU workers as they are measured: the work that they are said to have, and its end."""

import threading

import pytest
import torch
from gpu_cases import DEVICE

from profiler.machine.handoff import Handoff, HandoffShape

SMALL = HandoffShape(layers=2, d=128, neurons=24)


@pytest.mark.parametrize("threads", [1, 2])
def test_each_layer_adds_its_active_neurons(threads):
    """A neuron is relu(1) * 1 in every column of the norm 1, times 2^-7."""
    with Handoff(torch.device(DEVICE), threads, SMALL) as handoff:
        for count, total in ((5, 5), (24, 29)):
            handoff.draw(count, seed=1)
            handoff.active()
            handoff.check()
            torch.testing.assert_close(handoff.x.cpu(), torch.full((1, 128), 1 + 2 * total / 128), rtol=1e-5, atol=0)


def test_an_empty_request_is_answered_by_zeros():
    with Handoff(torch.device(DEVICE), 2, SMALL) as handoff:
        handoff.empty()
        handoff.check()
        assert (handoff.x == 1).all()


def test_no_thread_is_left_and_errors_are_raised():
    before = threading.active_count()
    with Handoff(torch.device(DEVICE), 2, SMALL) as handoff:
        handoff._mailbox.state[2] = 1
        with pytest.raises(RuntimeError, match="did not answer"):
            handoff.check()
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a CUDA GPU")
def test_more_neurons_take_longer():
    with Handoff(torch.device("cuda"), 2) as handoff:
        assert 0 < handoff.seconds() < handoff.seconds(200) < 1e-2
