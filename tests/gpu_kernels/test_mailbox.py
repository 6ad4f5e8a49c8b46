"""The GPU's end of the mailbox against its references: requests, answers, waits that end, and what a failure leaves."""

import threading
import time

import pytest
import torch
from gpu_cases import DEVICE, assert_close, random_input

from cpu_kernels.contract import Flag
from gpu_kernels.box import REPORT_WORDS, Mailbox, State, ZeroCopy
from gpu_kernels.mailbox import ask, ask_ref, post, post_ref, receive, receive_ref, send, send_ref

EPS = 1e-5
ANSWERED = 10**6  # beyond any request's number


def make_box(d=17, f=129, timeout=30.0):
    """A mailbox in which the answers are there already."""
    report = torch.tensor([4, 0, 0, 0, 3, 0, 100, 200, 300], device=DEVICE)
    assert len(report) == REPORT_WORDS
    box = Mailbox.new(d, f, report, DEVICE == "cuda", timeout)
    box.flags[Flag.DONE] = ANSWERED
    box.ids.fill_(-1)
    box.out.copy_(random_input(32, d, 9))
    return box


def finish():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def assert_same(found, expected):
    """Two mailboxes: bit for bit but for what the host reads as x, where norms are rounded in another order."""
    finish()
    assert_close(found.x, expected.x)
    for name in ("request", "ids", "masks", "state", "tallies"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if name == "state":  # but for how long each waited
            ours, theirs = ours[: State.WAITED], theirs[: State.WAITED]
        assert (ours == theirs).all(), f"{name} is {ours.tolist()}, expected {theirs.tolist()}"


def positions_of(tokens, start=7):
    return torch.arange(start, start + tokens, dtype=torch.int32, device=DEVICE)


def norm_of(d, layer):
    """Weights of a norm, LayerNorm's if `layer`; None for none at all."""
    if layer is None:
        return None, None
    return 1 + random_input(1, d, 5)[0] / 4, random_input(1, d, 6)[0] if layer else None


@pytest.mark.parametrize(("tokens", "d", "layer"), [(1, 1, False), (2, 17, True), (32, 300, False), (2, 17, None)])
def test_post(tokens, d, layer):
    x, (weight, bias) = random_input(tokens, d), norm_of(d, layer)
    outs, boxes = [torch.zeros_like(x), torch.zeros_like(x)], [make_box(d), make_box(d)]
    post(x, weight, bias, EPS, outs[0], boxes[0])
    post_ref(x, weight, bias, EPS, outs[1], boxes[1])
    assert_close(*outs)
    assert_same(*boxes)


def masks_of(kind, f, tokens):
    generator = torch.Generator().manual_seed(f)
    found = torch.randint(1, 2**tokens, (f,), generator=generator).to(torch.int32)  # bit 31 is the sign
    found *= torch.rand(f, generator=generator) < {"none": 0, "some": 0.3, "all": 1}[kind]
    if kind == "one":
        found[-1] = 1
    return found.to(DEVICE)


def ints(size):
    return torch.full((max(1, size),), 99, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize(
    ("f", "hot", "stop", "kind"),
    [
        (1, 0, None, "all"),
        (17, 17, None, "all"),
        (129, 40, None, "some"),
        (129, 129, None, "some"),
        (300, 0, None, "some"),
        (300, 120, None, "none"),
        (300, 120, 200, "some"),
        (129, 0, 17, "all"),
        (129, 40, 129, "some"),
        (129, 40, 41, "none"),
    ],
)
def test_send(f, hot, stop, kind, tokens):
    """stop: the end of those neurons that the GPU reads in host memory, if any."""
    found, masks = [], masks_of(kind, f, tokens)
    for send_it in (send, send_ref):
        box, here = make_box(f=f), (ints(hot), ints(hot), ints(1))
        zero_copy = None if stop is None else ZeroCopy(stop, ints(stop - hot), ints(stop - hot), ints(1))
        spare = torch.zeros(f, dtype=torch.int32, device=DEVICE)
        send_it(masks, hot, *here, spare, box, 3, positions_of(tokens), zero_copy)
        found.append((box, *here, *(() if zero_copy is None else (zero_copy.ids, zero_copy.masks, zero_copy.count))))
    assert_same(found[0][0], found[1][0])
    assert all((ours == theirs).all() for ours, theirs in zip(found[0][1:], found[1][1:], strict=True))
    box, sent = found[0][0], bool((masks[hot if stop is None else stop :] != 0).any())
    assert box.request[0] == (5 if sent else 0) and int(box.state[State.DUE]) == sent


@pytest.mark.parametrize(("op", "tokens", "d", "given"), [(0, 1, 17, False), (1, 32, 300, True), (2, 2, 1, True)])
def test_ask(op, tokens, d, given):
    boxes, x = [make_box(d), make_box(d)], random_input(tokens, d) if given else None
    for box, ask_it in zip(boxes, (ask, ask_ref), strict=True):
        ask_it(op, 6, x, box, positions_of(tokens), tokens, 31)
    assert_same(*boxes)
    assert boxes[0].request[:6].tolist() == [5, op, 6, -1, tokens, 7]


@pytest.mark.parametrize(("tokens", "d", "layer"), [(1, 17, True), (2, 300, False), (32, 1, False), (2, 17, None)])
@pytest.mark.parametrize("what", ["all", "answer", "layer", "nothing due", "nothing asked"])
def test_receive(tokens, d, layer, what):
    weight, bias = norm_of(d, layer)
    parts, added = (random_input(3 * tokens, d, 3).view(3, tokens, d), random_input(1, d, 4)[0])
    if what in ("answer", "layer"):
        parts = added = None
    found, boxes = [], [make_box(d), make_box(d)]
    for box, receive_it in zip(boxes, (receive, receive_ref), strict=True):
        if what != "nothing due":
            ask(0, 1, None, box, positions_of(tokens), tokens)
        x = random_input(tokens, d)
        out = torch.zeros_like(x)
        asked = what != "nothing asked"
        receive_it(x, parts, added, weight, bias, EPS, out, box, asked, replace=what == "layer")
        found.append((x, out))
    assert_same(*boxes)
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


def test_receive_waits_for_the_answer():
    """Another thread answers while it waits."""
    box, x = make_box(), random_input(2, 17)
    box.flags[0] = 4
    expected, answer, (weight, bias) = x.clone(), random_input(2, 17, 11).cpu(), norm_of(17, False)

    def answer_later():
        while box.request[0] < 5:
            time.sleep(1e-3)
        time.sleep(0.05)
        box.out[:2] = answer
        box.flags[0] = 5

    thread = threading.Thread(target=answer_later)
    thread.start()
    ask(0, 0, None, box, positions_of(2), 2)
    receive(x, None, None, weight, bias, EPS, torch.zeros_like(x), box, asked=True)
    thread.join()
    finish()
    assert_close(x, expected + answer.to(x))
    assert int(box.state[State.FAILED]) == 0 < int(box.state[State.WAITED])


def test_without_an_answer_the_step_fails_and_no_later_wait_is_one():
    # The clock of the interpreter counts polls: 100 here.
    box, x = make_box(timeout=1e-7), random_input(2, 17)
    box.flags[0] = 4
    (weight, bias), before = norm_of(17, False), x.clone()
    ask(0, 0, None, box, positions_of(2), 2)
    receive(x, None, None, weight, bias, EPS, torch.zeros_like(x), box, asked=True)
    finish()
    assert int(box.state[State.FAILED]) == 5 and (x == before).all()
    box.state[State.FAILED] = 77  # a wait that ends in time would set it again
    ids, masks = torch.zeros(40, dtype=torch.int32).to(DEVICE), torch.ones(129, dtype=torch.int32).to(DEVICE)
    requests = (
        lambda: ask(1, 2, x, box, positions_of(2), 2),
        lambda: send(masks, 40, ids, masks.clone(), ids[:1].clone(), masks.clone(), box, 1, positions_of(2)),
    )
    for request in requests:
        request()
        receive(x, None, None, weight, bias, EPS, torch.zeros_like(x), box, asked=True)
        finish()
        assert int(box.state[State.FAILED]) == 77 and (x == before).all()
        assert box.request[0] == 5 and int(box.state[State.NUMBER]) == 5


def test_nothing_due_does_not_wait():
    """Although no answer is there: the last one was of the request before."""
    box, x = make_box(timeout=1e-7), random_input(1, 17)
    box.flags[0], box.state[State.NUMBER] = 3, 4
    receive(x, None, None, *norm_of(17, False), EPS, torch.zeros_like(x), box, asked=True)
    finish()
    assert int(box.state[State.FAILED]) == 0


def test_shapes_are_checked():
    box, x = make_box(), random_input(2, 17)
    weight, bias = norm_of(17, False)
    for bad, out in ((x[:, :16], x[:, :16].clone()), (x.double(), x), (x, x[:1]), (random_input(33, 17),) * 2):
        with pytest.raises(ValueError, match="mailbox takes contiguous f32"):
            post(bad, weight, bias, EPS, out, box)
        with pytest.raises(ValueError, match="mailbox takes contiguous f32"):
            receive(bad, None, None, weight, bias, EPS, out, box, asked=False)
