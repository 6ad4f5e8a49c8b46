"""Cold rows that the GPU reads in host memory: which are registered, up to where, and what is let go."""

import gc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE
from step_cases import StepCase, tiny_model

from cpu_kernels.matrix import Matrix
from hybrid.model.ffn import FFNMatrices
from hybrid.runtime.gpu import host_rows
from hybrid.runtime.gpu.host_rows import HostRows, memory_limit

pytest.importorskip("transformers")
NEURONS, HOT, WIDTH = 48, 16, 64
NEURON_BYTES = 2 * 4 * WIDTH


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


class FakeCuda:
    """Registers memory but what begins where `refused` says, or with refused flags."""

    def __init__(self, monkeypatch):
        self.spans, self.refused, self.let_go, self.flags = [], lambda start, size: False, [], []
        self.refused_flags = set()
        cudart = SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.let_go.append)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(host_rows.torch, "zeros", lambda *size, device: None)

    def register(self, start, size, flags):
        known = [each for each in self.spans if each[0] not in self.let_go]
        assert all(start + size <= first or stop <= start for first, stop in known), "memory is registered twice"
        if self.refused(start, size) or flags in self.refused_flags:
            return 1
        self.spans.append((start, start + size))
        self.flags.append(flags)
        return 0

    def knows(self, matrix):
        start = matrix.rows.ctypes.data
        return any(span[0] <= start and start + matrix.nbytes <= span[1] for span in self.spans)


@pytest.fixture
def cuda(monkeypatch):
    gc.collect()  # what other tests have registered is let go by the real one
    return FakeCuda(monkeypatch)


def model_of(layers=3, hot=HOT, width=WIDTH):
    """Layers without a gate whose matrices lie one after another in one block of memory."""
    rows = np.zeros((2 * layers, NEURONS, width), np.float32)
    matrices = [
        FFNMatrices(None, Matrix(up, width), Matrix(down, width))
        for up, down in rows.reshape(layers, 2, NEURONS, width)
    ]
    return SimpleNamespace(ffns=[SimpleNamespace(matrices=m, hot=hot) for m in matrices])


def placed(zero_copy, on_gpu=None):
    on_gpu = np.ones(len(zero_copy), bool) if on_gpu is None else np.array(on_gpu)
    return SimpleNamespace(zero_copy=np.array(zero_copy), layer_on_gpu=on_gpu)


def registered(model, zero_copy=(3, 2, 0), limit=None, **given):
    return HostRows(model, placed(zero_copy, **given), torch.device("cuda"), limit=limit)


def counts(neurons):
    return {layer: len(m.up.rows) for layer, m in neurons.items()}


def test_all_cold_rows_are_registered_once_for_both(cuda):
    model = model_of()
    host = registered(model)
    assert counts(host.cold) == dict.fromkeys(range(3), NEURONS - HOT) and counts(host.zero_copy) == {0: 3, 1: 2}
    assert host.most_zero_copy == 3 and not host.refused and not host.notices
    for m in (*host.cold.values(), *host.zero_copy.values()):
        assert cuda.knows(m.up) and cuda.knows(m.down)
    assert np.shares_memory(host.zero_copy[0].up.rows, model.ffns[0].matrices.up.rows)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_up_to_a_limit_beside_which_the_kernels_rows_have_their_place(cuda, layers):
    neurons = layers * (NEURONS - HOT) + sum((3, 2, 4)[layers:])
    host = registered(model_of(), (3, 2, 4), neurons * NEURON_BYTES)
    assert list(registered(model_of(), (3, 2, 4), neurons * NEURON_BYTES - 1).cold) == list(range(layers - 1))
    assert list(host.cold) == list(range(layers)) and counts(host.zero_copy) == {0: 3, 1: 2, 2: 4}
    assert not host.refused and all(cuda.knows(m.down) for m in host.zero_copy.values())
    assert f"at most 50% of memory is pinned, which leaves out cold neurons of {3 - layers} layers" in host.notices[0]


def test_where_cuda_refuses_the_kernels_rows_are_tried_alone(cuda):
    """Of layer 1 the second matrix is refused whole; of layer 2 its zero-copy rows, too."""
    model = model_of()
    down, last = (model.ffns[n].matrices.down.rows[HOT:] for n in (1, 2))
    cuda.refused = lambda start, size: (start, size) == (down.ctypes.data, down.nbytes) or start == last.ctypes.data
    host = registered(model, (3, 2, 4))
    assert list(host.cold) == [0] and counts(host.zero_copy) == {0: 3, 1: 2} and host.refused == 4
    assert len(cuda.let_go) >= 1 and host.notices[0].startswith("4 neurons are left to the CPU")
    assert "CUDA pins no more, which leaves out cold neurons of 2 layers" in host.notices[1]


def test_all_is_let_go_before_the_memory_is(cuda):
    model = model_of()
    host = registered(model)
    starts = [span[0] for span in cuda.spans]
    del host
    gc.collect()
    assert cuda.let_go == starts


def test_nothing_where_all_are_hot_or_on_the_cpu(cuda):
    assert not registered(model_of(hot=NEURONS), (0, 0, 0)).cold
    host = registered(model_of(), on_gpu=[False, True, False])
    assert list(host.cold) == [1] and list(host.zero_copy) == [1]
    assert len(cuda.spans) == 2


def test_half_of_the_memory_is_the_limit():
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    assert memory_limit() == pytest.approx(512 * kilobytes, rel=0.01)


@pytest.mark.parametrize("refused", [False, True])
def test_rows_of_a_mapped_file_are_registered_as_read_only_or_copied_for_the_kernels(cuda, refused):
    model = model_of()
    for ffn in model.ffns:
        for matrix in (ffn.matrices.up, ffn.matrices.down):
            matrix.rows.flags.writeable = False
    cuda.refused_flags = {8} if refused else set()
    host = registered(model)
    assert list(host.cold) == ([] if refused else [0, 1, 2]) and counts(host.zero_copy) == {0: 3, 1: 2}
    assert set(cuda.flags) == ({0} if refused else {8})
    for layer, m in host.zero_copy.items():
        own = model.ffns[layer].matrices
        assert np.shares_memory(m.up.rows, own.up.rows) != refused and m.down.rows.flags.writeable == refused
        assert np.array_equal(m.up.rows, own.up.rows[HOT : HOT + len(m.up.rows)])


def test_rows_of_a_packed_model_are_read_where_they_lie(models):
    """Its rows are a mapped file."""
    case = StepCase(tiny_model("llama-relu", models, "int4"), share=0.4, zero_copy=20)
    matrices, zero_copy, hot = case.model.ffns[0].matrices, case.host.zero_copy[0], case.model.ffns[0].hot
    for name in ("gate", "up", "down"):
        found, rows = getattr(zero_copy, name).rows, getattr(matrices, name).rows
        assert np.array_equal(found, rows[hot : hot + 20]) and not rows.flags.writeable
    assert case.host.cold.keys() == {0, 1} and not case.host.notices
    case.close()


def test_kernels_read_only_predicted_neurons_of_layers_on_the_gpu(models):
    case, device = StepCase(tiny_model("llama-relu", models), share=0.4), torch.device(DEVICE)
    case.placement.zero_copy[:] = 20
    case.host = None  # as CUDA does not register the same rows twice
    case.step._host = None
    gc.collect()
    for predicted, on_gpu, layers in ((True, True, {0, 1}), (False, True, set()), (True, False, {1})):
        case.placement.layer_on_gpu[0] = on_gpu
        host = HostRows(case.model, case.placement, device, predicted)
        assert host.zero_copy.keys() == layers and host.cold.keys() == ({0, 1} if on_gpu else {1})
        del host
        gc.collect()
    case.close()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_registered_rows_are_pinned_for_torch(models):
    gc.collect()  # what earlier tests have registered may share pages with these
    case = StepCase(tiny_model("llama-tied-mha-bias", models), share=0.4, zero_copy=20)
    assert case.host.cold.keys() == {0, 1}
    for m in case.host.cold.values():
        assert m.up.tensor().is_pinned() and m.down.tensor().is_pinned() and m.up_bias.is_pinned()
    case.close()
