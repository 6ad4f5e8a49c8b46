"""The CPU's end of the mailbox, with a stand-in for the GPU that writes requests: answers, idling, ways to end."""

import threading
import time

import numpy as np
import pytest
import torch
from matrix_cases import THREADS
from step_cases import CAPACITY, relative_error, some_tokens, tiny_model

from cpu_kernels import barrier
from cpu_kernels.activations import activate_ref
from cpu_kernels.contract import MAX_BATCH, Flag, Op, Word
from cpu_kernels.mailbox import Box, serve, stop
from cpu_kernels.worker_pool import Each, WorkerPool
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache, Row
from hybrid.model.loader import ModelFolder
from hybrid.model.transformer import OPT_POSITION_OFFSET
from hybrid.runtime.cpu_step import CpuStep
from placement.placement import Placement

pytest.importorskip("transformers")
GATED, BIASED, UNGATED = "llama-relu", "llama-tied-mha-bias", "opt"
EVERYONE = 2**MAX_BATCH - 1  # as a mask
PATIENCE = 300.0  # seconds until a test gives up, more than it takes to compile the workers


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    monkeypatch.setattr("hybrid.model.kv_cache.BLOCK_SIZE", 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models."""
    return tmp_path_factory.mktemp("models")


class Machine:
    """Workers that serve, and the GPU's side of their mailbox."""

    def __init__(self, folder, threads=2, hot=0, strategy="exact"):
        opened = ModelFolder.open(folder)
        spec = opened.spec
        placement = Placement.all_cold(spec)
        placement.hot[:] = hot
        runtime = FFNRuntime("exact", WorkerPool(threads), spec.d_model, spec.d_ff)
        self.model, self.pool, self.spec = opened.build(runtime, placement, None), runtime.pool, spec
        self.cache = KVCache(spec, CAPACITY)
        self.step = CpuStep(self.model, self.cache, runtime)
        d, f = spec.d_model, spec.d_ff
        self.box = Box(
            request=np.zeros(16, np.int64),
            flags=np.zeros(64, np.int64),
            x=np.zeros((MAX_BATCH, d), np.float32),
            ids=np.zeros(f, np.int32),
            masks=np.full(f, EVERYONE, np.uint32),
            out=np.full((MAX_BATCH, d), np.nan, np.float32),
        )
        given = self.step.arguments(strategy)
        self.given, self.error = (self.box, *given), None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        try:
            self.pool.run(self.kernel, self.pool.threads, self.pool.barrier, *self.given)
        except RuntimeError as error:
            self.error = error

    kernel = staticmethod(serve)

    def __enter__(self):
        self.thread.start()
        self.until(lambda: self.box.flags[Flag.READY])
        return self

    def __exit__(self, *_):
        stop(self.box)
        self.ended()
        self.pool.close()

    def until(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "no answer in time"
            time.sleep(1e-4)

    def ended(self):
        self.thread.join(20)
        assert not self.thread.is_alive()

    def post(self, op, layer, x, ids=None, masks=None, position=0):
        """Write a request as the GPU does, its number last."""
        box = self.box
        box.x[: len(x)] = x
        if ids is not None:
            box.ids[: len(ids)] = ids
        if masks is not None:
            box.masks[: len(masks)] = masks
        if op == Op.LAYER:
            self.cache.truncate(position)
            self.cache.advance(position - self.cache.length)
            self.step.place([Row(self.cache, 0)] * len(x))
        box.request[Word.OP :][:5] = op, layer, -1 if ids is None else len(ids), len(x), position
        box.request[Word.NUMBER] += 1

    def ask(self, *request, **rest):
        """`out` [t, d] of a request, once it is answered."""
        self.post(*request, **rest)
        self.until(lambda: self.box.flags[Flag.DONE] == self.box.request[Word.NUMBER])
        return self.box.out[: len(request[2])].copy()


def random_x(tokens, d, seed=0):
    return np.random.default_rng([seed, tokens]).standard_normal((tokens, d)).astype(np.float32)


def expected(ffn, x, ids, masks):
    """The FFN of neurons `ids`, each for the tokens of its mask, in f64, and the same of absolute values, which bounds
    errors; the bias of down is the GPU's to add."""
    m, ids = ffn.matrices, ids.astype(np.int64)
    bits = (torch.from_numpy(masks.astype(np.int64)) >> torch.arange(len(x))[:, None]) & 1

    def compute(activate, cast):
        def project(matrix, bias):
            z = cast(torch.from_numpy(x).double()) @ cast(matrix.widen()[ids].double()).T
            return z if bias is None else z + cast(bias[ids].double())

        up = project(m.up, m.up_bias)
        hidden = activate(up) if m.gate is None else activate(project(m.gate, m.gate_bias)) * up
        return ((hidden * bits) @ cast(m.down.widen()[ids].double())).numpy()

    return compute(lambda z: activate_ref(ffn.act.name, z), lambda t: t), compute(torch.abs, torch.abs)


def check_ffn(machine, layer, x, ids, masks, dtype="f32", asked=True):
    """asked: whether the ids go along, rather than that all cold neurons are asked for."""
    machine.box.out[:] = np.nan
    found = machine.ask(Op.FFN, layer, x, **({"ids": ids, "masks": masks} if asked else {}))
    truth, scale = expected(machine.model.ffns[layer], x, ids, masks)
    tolerance = 5e-5 if dtype.startswith("int") else 1e-6  # blocks add the rounding of inputs to 16 bits
    assert (np.abs(found - truth) <= tolerance * scale).all(), f"{np.max(np.abs(found - truth) / scale):.1e}"


@pytest.mark.parametrize(
    ("name", "dtype", "strategy"),
    [
        (GATED, "f32", "learned"),
        (BIASED, "f32", "dense"),
        (UNGATED, "f32", "exact"),
        (GATED, "bf16", "exact"),
        (GATED, "int8", "learned"),
        (UNGATED, "int4", "dense"),
    ],
)
def test_ffn_of_neurons_that_are_listed_and_of_all_cold_ones(models, name, dtype, strategy):
    with Machine(tiny_model(name, models, dtype), hot=9, strategy=strategy) as machine:
        d, f = machine.spec.d_model, machine.spec.d_ff
        cold, ones = np.arange(9, f), np.full(f, EVERYONE, np.uint32)
        rng = np.random.default_rng(1)
        for tokens in (1, 2, 8, 32):
            x = random_x(tokens, d)
            check_ffn(machine, 1, x, cold, ones[9:], dtype, asked=False)
            some = np.sort(rng.choice(cold, 31, replace=False))
            masks = rng.integers(1, 2**tokens, 31).astype(np.uint32)
            check_ffn(machine, 0, x, some, masks, dtype)
            check_ffn(machine, 0, x, cold[-1:], masks[:1], dtype)
        check_ffn(machine, 0, random_x(1, d, 5), cold[3:9], ones[:6], dtype)
        assert (machine.ask(Op.FFN, 0, random_x(2, d), ids=cold[:0]) == 0).all()


def test_one_token_needs_no_masks(models):
    """A batch before it left some, with the bit of the first token unset."""
    with Machine(tiny_model(GATED, models)) as machine:
        ids, x = np.arange(5, 40), random_x(2, machine.spec.d_model)
        machine.ask(Op.FFN, 0, x, ids=ids, masks=np.full(35, 2, np.uint32))
        found = machine.ask(Op.FFN, 0, x[:1], ids=ids)
        truth, scale = expected(machine.model.ffns[0], x[:1], ids, np.full(35, 1, np.uint32))
        assert (np.abs(found - truth) <= 1e-6 * scale).all()


def test_an_input_that_comes_ahead_of_its_request(models):
    """Workers take it at once; a batch, or another input that came ahead, takes its place."""
    with Machine(tiny_model(GATED, models)) as machine:
        xs, ids = random_x(8, machine.spec.d_model), np.arange(5, 40)
        alone = [machine.ask(Op.FFN, 0, x[None], ids=ids) for x in xs]
        for number in (1, 2, 3):
            ahead = xs[number : number + 1]
            machine.box.x[:1] = ahead
            machine.box.request[Word.POSTED] = number
            time.sleep(0.01)
            assert (machine.ask(Op.FFN, 0, ahead, ids=ids) == alone[number]).all()
            machine.ask(Op.FFN, 0, xs[:2], ids=ids, masks=np.full(35, 3, np.uint32))
            machine.ask(Op.LAYER, 1, xs[4:5])
            machine.ask(Op.HEAD, machine.spec.n_layers, xs[5:6])


@pytest.mark.parametrize("name", [GATED, UNGATED])
def test_whole_layers_and_the_head_are_the_decode_step(models, name):
    """Bit for bit, with tokens one by one and in batches."""
    folder, tokens = tiny_model(name, models), some_tokens(11)
    alone = Machine(folder)
    truth = torch.stack([alone.step.run(token, "exact").clone() for token in tokens])
    alone.pool.close()
    with Machine(folder) as machine:
        model, at = machine.model, 0
        for count in (1, 2, 1, 7):
            ids = np.array(tokens[at : at + count])
            x = model.embedding.widen(ids)
            if model.positions is not None:
                x = x + model.positions.widen(at + np.arange(count) + OPT_POSITION_OFFSET)
            for layer in range(machine.spec.n_layers):
                x = machine.ask(Op.LAYER, layer, x, position=at)
            machine.ask(Op.HEAD, machine.spec.n_layers, x)
            at += count
            logits = torch.from_numpy(machine.step.arguments("exact").shared.logits[:count])
            assert (logits == truth[at - count : at]).all(), f"error {relative_error(logits, truth[at - count : at])}"


@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_same_bits_for_any_number_of_workers(models, dtype):
    found, ids = [], np.arange(3, 77, 2)
    masks = (ids % 255 + 1).astype(np.uint32)
    for threads in THREADS:
        with Machine(tiny_model(GATED, models, dtype), threads) as machine:
            x = random_x(8, machine.spec.d_model)
            parts = [machine.ask(Op.FFN, 0, x, ids=ids, masks=masks), machine.ask(Op.FFN, 1, x[:1])]
            machine.ask(Op.HEAD, machine.spec.n_layers, machine.ask(Op.LAYER, 1, x[:3]))
            parts.append(machine.step.arguments("exact").shared.logits.copy())
        found.append(np.concatenate([part.ravel() for part in parts]))
    assert all((other == found[0]).all() for other in found[1:])


def test_idle_workers_nap_and_still_answer(models):
    with Machine(tiny_model(GATED, models)) as machine:
        x = random_x(1, machine.spec.d_model)
        first = machine.ask(Op.FFN, 0, x)
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.4)
        used = time.process_time() - before
        assert used < 0.2, f"{used:.2f} s of CPU time in 0.4 s"  # two that poll use 0.4 at least
        assert (machine.ask(Op.FFN, 0, x) == first).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_stop_ends_idle_workers(models, threads):
    with Machine(tiny_model(GATED, models), threads) as machine:
        machine.ask(Op.FFN, 0, random_x(1, machine.spec.d_model))
        stop(machine.box)
        machine.ended()
        assert machine.error is None


def test_a_worker_that_stops_does_not_keep_one_that_saw_a_request(models):
    """As where a request and the stop come together: worker 1 never sees the request that worker 0 is at."""
    machine = Machine(tiny_model(GATED, models))
    unaware = machine.box._replace(request=np.zeros_like(machine.box.request))
    machine.given = Each((machine.box, unaware)), *machine.given[1:]
    with machine:
        machine.post(Op.FFN, 0, random_x(1, machine.spec.d_model))
        time.sleep(0.05)


def test_abort_ends_workers(models):
    with Machine(tiny_model(GATED, models)) as machine:
        barrier.abort(machine.pool.barrier)
        machine.ended()


def test_an_exception_in_a_worker_ends_the_others(models):
    """It must come out of `run`, with the pool fit for the next one."""

    def one_fails(worker, workers, *args):
        if worker == 1:
            time.sleep(0.05)
            raise RuntimeError("worker 1 failed")
        serve(worker, workers, *args)

    machine = Machine(tiny_model(GATED, models))
    machine.kernel = one_fails
    machine.thread.start()
    machine.ended()
    assert "worker 1 failed" in str(machine.error)
    machine.kernel, machine.thread = serve, threading.Thread(target=machine._run, daemon=True)
    with machine:
        assert np.isfinite(machine.ask(Op.FFN, 0, random_x(1, machine.spec.d_model))).all()
