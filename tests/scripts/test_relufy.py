"""`relufy.py`: networks compute what transformers' do, gates become sparse, runs go on where they stopped."""

import json
import lzma
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from model_cases import SHAPE, make_model

from hybrid.errors import InputError, ModelError
from profiler.common.errors import CorpusError, HybridError

CONTEXT = 16


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these matrices are too small to share out
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def scripts(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")


@pytest.fixture
def net():
    import relufy_net

    return relufy_net


@pytest.fixture
def train():
    import relufy_train

    return relufy_train


@pytest.fixture
def script():
    import relufy

    return relufy


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A small SiLU Llama of random weights, tied, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("dense")
    make_model("llama-relu", folder, hidden_act="silu", tie_word_embeddings=True)
    return folder


@pytest.fixture
def corpus(tmp_path):
    """Token ids in which each is mostly followed by the next one."""
    draw = np.random.default_rng(0)
    ids = (np.arange(1600) + (draw.random(1600) < 0.2) * draw.integers(0, 60, 1600)) % 60 + 40
    path = tmp_path / "ids.bin.xz"
    path.write_bytes(lzma.compress(ids.astype(np.uint16).tobytes()))
    return path


def windows(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE["vocab_size"], (count, CONTEXT), generator=draw, dtype=torch.int32)


def logits(net, base, weights, ids, blend=None):
    hidden = net.Network(base, CONTEXT, False)(ids.long(), weights, blend)[0]
    return F.linear(hidden, base.head).detach()


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama-relu", {"hidden_act": "silu"}),
        ("llama-rope-linear", {}),
        ("llama-rope-llama3", {"hidden_act": "silu", "tie_word_embeddings": True}),
        ("llama-yarn", {"hidden_act": "silu"}),
        ("qwen2", {"hidden_act": "silu"}),
        ("qwen3", {}),
    ],
)
def test_the_dense_network_computes_what_transformers_does(net, tmp_path, case, changes):
    truth = make_model(case, tmp_path, **changes)
    base, ids = net.load_base(tmp_path, "cpu", torch.float32), windows(3)
    with torch.no_grad():
        torch.testing.assert_close(logits(net, base, base, ids), truth(ids.long()).logits, atol=2e-4, rtol=2e-4)


def test_a_difference_of_nothing_is_the_same_weights_with_relu_and_blends_into_the_dense_one(net, dense, tmp_path):
    truth = make_model("llama-relu", tmp_path, tie_word_embeddings=True)
    base, ids = net.load_base(dense, "cpu", torch.float32), windows(2)
    for rank in (4, None):
        difference = net.Difference(base, dict.fromkeys(net.MATRICES, rank), 0)
        found = [logits(net, base, difference, ids, torch.tensor(share)) for share in (0.0, 1.0)]
        with torch.no_grad():
            torch.testing.assert_close(found[0], truth(ids.long()).logits, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(found[1], logits(net, base, base, ids), atol=1e-4, rtol=1e-4)


def test_the_firing_share_counts_gates_above_zero(net, dense):
    base, ids = net.load_base(dense, "cpu", torch.float32), windows(2)
    base.stacked["gate"][1] = 0
    difference = net.Difference(base, dict.fromkeys(net.MATRICES, 2), 0)
    _, soft, fired = net.Network(base, CONTEXT, False)(ids.long(), difference, torch.tensor(0.0))
    assert fired[1] == 0 and soft[1] == 0.5 and 0.3 < float(fired[0]) < 0.7


@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_the_losses_gradient_is_what_autograd_finds(train, monkeypatch, label_weight):
    monkeypatch.setattr(train, "_CHUNK_TOKENS", 2 * CONTEXT)
    draw = torch.Generator().manual_seed(1)
    ids, head = windows(3).long(), torch.randn(SHAPE["vocab_size"], 8, generator=draw)
    sparse, dense = (torch.randn(3, CONTEXT, 8, generator=draw) for _ in range(2))
    sparse.requires_grad_()
    logs, wanted = F.linear(sparse, head).log_softmax(-1), F.linear(dense, head).log_softmax(-1)
    kl = (wanted.exp() * (wanted - logs)).sum(-1)
    entropy = -logs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    mixed = kl[:, -1].sum() + (1 - label_weight) * kl[:, :-1].sum() + label_weight * entropy.sum()
    (expected,) = torch.autograd.grad(mixed / ids.numel(), sparse)
    found, gradient = train.Distillation(head, label_weight, False)(sparse.detach(), dense, ids)
    torch.testing.assert_close(found, kl.mean().detach())
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reads", [60, 600])
def test_the_controller_brings_the_share_to_what_is_wanted(train, reads):
    """The plant: a share that follows the penalty with a lag of a twentieth of the run."""
    settings, controller, firing, penalty = train.Settings(firing=0.15), train.Controller(), 0.36, 0.0
    for read in range(reads):
        firing += (0.4 / (1 + 3 * penalty) - firing) * min(1.0, 20 / reads)
        wanted = settings.firing_at(read / reads, 0.36)
        penalty = controller.update(firing, wanted, 1 / reads)
    assert wanted == 0.15 and abs(firing / 0.15 - 1) < 0.03


def test_schedules_begin_and_end_as_they_say(train):
    settings = train.Settings(firing=0.1, rate=2.0, descent=0.5, blend=0.2, cooldown=0.6)
    assert settings.rate_at(0) < 0.01 and settings.rate_at(0.3) == 2.0 and settings.rate_at(1) == 0
    assert math.isclose(settings.rate_at(0.7), 1.0)
    assert settings.blend_at(0) == 1 and settings.blend_at(0.2) == 0 == settings.blend_at(0.9)
    assert math.isclose(settings.firing_at(0.25, 0.4), 0.2) and settings.firing_at(0.8, 0.4) == 0.1
    assert settings.firing_at(0, 0.05) == 0.1


def call(script, *arguments):
    return CliRunner().invoke(script.main, [str(each) for each in arguments])


SMALL = ("--device", "cpu", "--context", CONTEXT, "--batch", 8, "--rate", "0.003", "--held-out-windows", 10)


@pytest.mark.parametrize("rank", ["6", "full"])
def test_a_dense_model_becomes_a_sparse_one(script, net, dense, corpus, tmp_path, rank):
    out = tmp_path / "out"
    done = call(script, dense, "--corpus", corpus, "--steps", 120, "--firing", "20%", "--rank", rank, "-o", out,
                "--bits", 8, *SMALL)  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((out / "relufy.json").read_text())
    assert 0.16 < report["firing"] < 0.27 and len(report["firing_by_layer"]) == SHAPE["num_hidden_layers"]
    rows = json.loads((out / "train_log.json").read_text())["rows"]
    assert len(rows) == 12 and rows[0]["firing"] > 0.4
    assert report["kl"] < 0.9 * untrained(script, net, dense, corpus)
    assert not (tmp_path / "out.checkpoint").exists()
    base, sparse = (net.load_base(*each) for each in ((dense, "cpu", torch.float32), (out, "cpu", torch.float32, True)))
    assert sparse.spec.activation == "relu" and sparse.spec.tied
    assert (out / "difference.npz").exists() == (rank != "full")
    if rank != "full":
        started = net.Difference(base, dict.fromkeys(net.MATRICES, 7), 0)
        started.start_from(out / "difference.npz")
        ids = windows(2)
        found = logits(net, base, started, ids, torch.tensor(0.0))
        torch.testing.assert_close(found, logits(net, sparse, sparse, ids), atol=1e-3, rtol=1e-3)
    again = call(script, dense, "--corpus", corpus, "--measure", out, *SMALL)
    assert f"KL {report['kl']:.4f}" in again.output and f"firing {report['firing']:.2%}" in again.output


def untrained(script, net, dense, corpus):
    """KL of the weights as they are, with ReLU."""
    import relufy_train

    base = net.load_base(dense, "cpu", torch.float32)
    text = script.Text.read(dense, base.spec, [corpus], [], 10, CONTEXT)
    nothing = net.Difference(base, dict.fromkeys(net.MATRICES, 1), 0)
    return relufy_train.measure(net.Network(base, CONTEXT, False), base, nothing, text.held_out).kl


def make_training(net, train, dense, steps=9, **changes):
    base = net.load_base(dense, "cpu", torch.float32)
    difference = net.Difference(base, dict.fromkeys(net.MATRICES, 3), 0)
    settings = train.Settings(**{"steps": steps, "batch": 4, "context": CONTEXT, "firing": 0.2} | changes)
    return difference, train.Training(base, difference, windows(10), settings, False)


def test_a_stopped_run_goes_on_to_the_same_result(net, train, dense, tmp_path, monkeypatch):
    whole, training = make_training(net, train, dense)
    training.run(lambda line: None, lambda: None)
    path, (half, training) = tmp_path / "c", make_training(net, train, dense)
    step, asked = training._step, []

    def stops(progress):
        asked.append(progress)
        if len(asked) > 5:
            raise KeyboardInterrupt
        step(progress)

    monkeypatch.setattr(training, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        training.run(lambda line: None, lambda: train.save_checkpoint(path, training, half, {"seed": 0}))
    rest, training = make_training(net, train, dense)
    train.load_checkpoint(path, training, rest, {"seed": 0})
    assert training.state.step == 5
    training.run(lambda line: None, lambda: None)
    assert training.state.step == 9 and training.tokens == 9 * 4 * CONTEXT
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(rest.state_dict()[name], expected, atol=0, rtol=0)


def test_kept_hidden_states_are_the_dense_models(net, train, dense, monkeypatch):
    base, text = net.load_base(dense, "cpu", torch.float32), windows(6)
    network, passes = net.Network(base, CONTEXT, False), []

    def counted(*arguments):
        passes.append(1)
        return network(*arguments)

    monkeypatch.setattr(train, "_free_memory", lambda device: 1 << 30)
    teacher = train.Teacher(base, counted, text)
    for chosen in ([0, 1, 2], [2, 3, 4], [4, 1, 0], [3, 2, 3]):
        expected = network(text[chosen].long(), base, None)[0]
        torch.testing.assert_close(teacher(torch.tensor(chosen), text[chosen].long()), expected, atol=1e-5, rtol=1e-5)
    assert len(passes) == 2


def test_checkpoints_of_other_settings_or_damaged_are_refused(net, train, dense, tmp_path):
    difference, training = make_training(net, train, dense)
    train.save_checkpoint(tmp_path / "c", training, difference, {"seed": 0, "rank": 3})
    with pytest.raises(InputError, match="run with seed 0, this one has 1"):
        train.load_checkpoint(tmp_path / "c", training, difference, {"seed": 1, "rank": 3})
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:500])
    with pytest.raises(InputError, match="cannot be read"):
        train.load_checkpoint(tmp_path / "c", training, difference, {"seed": 0, "rank": 3})


def test_a_loss_that_is_no_number_ends_the_run(net, train, dense):
    difference, training = make_training(net, train, dense)
    with torch.no_grad():
        difference.final_norm.fill_(math.nan)
    with pytest.raises(HybridError, match="loss is nan at step 0"):
        training.run(lambda line: None, lambda: None)


def test_text_and_conversations_are_read_each_with_its_end(script, net, dense, tmp_path):
    base, path = net.load_base(dense, "cpu", torch.float32), tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": "abcdefghij" * 9}) + "\n" for _ in range(4)))
    text = script.Text.read(dense, base.spec, [path], [], 5, CONTEXT)
    total = 4 * 90 // CONTEXT
    assert len(text.held_out) == total // 10 and len(text.train) == total - len(text.held_out)
    apart = script.Text.read(dense, base.spec, [path], [path], 5, CONTEXT)
    assert len(apart.train) == total and len(apart.held_out) == 5 and apart.train[:5].equal(apart.held_out)
    assert text.digest() != apart.digest()


def test_bad_input_is_told_in_one_line(script, net, train, dense, corpus, tmp_path):
    def told(*arguments):
        done = call(script, dense, "--corpus", corpus, *SMALL, *arguments)
        assert done.exit_code == 2
        return done.output

    assert "already exists" in told("-o", dense)
    assert "-o OUT" in told()
    assert "expected a share" in told("-o", tmp_path / "o", "--firing", "lots")
    assert "up to 50%" in told("-o", tmp_path / "o", "--firing", "80%")
    assert "or full" in told("-o", tmp_path / "o", "--rank", "all")
    assert "lower --context" in told("-o", tmp_path / "o", "--context", 65)
    assert "expected gates of relu" in told("--measure", dense)
    assert not (tmp_path / "o").exists()
    sparse = tmp_path / "sparse"
    make_model("llama-relu", sparse)
    with pytest.raises(ModelError, match="expected gates of silu"):
        net.load_base(sparse, "cpu", torch.float32)
    for case, what in (("granite", "embedding_scale"), ("olmo2", "norms"), ("opt", "not gated")):
        make_model(case, tmp_path / case)
        with pytest.raises(ModelError, match=what):
            net.load_base(tmp_path / case, "cpu", torch.float32)
    big = tmp_path / "big.bin"
    big.write_bytes(np.array([5, 131], np.uint16).tobytes())
    with pytest.raises(CorpusError, match="holds token id 131"):
        script.read_tokens(big, 131)
    with pytest.raises(CorpusError, match="0 windows"):
        script.Text.read(dense, net.load_base(dense, "cpu", torch.float32).spec, [corpus], [], 5, 1601)
    with pytest.raises(InputError, match="does not fit"):
        difference = net.Difference(net.load_base(dense, "cpu", torch.float32), dict.fromkeys(net.MATRICES, 3), 0)
        np.savez(tmp_path / "d.npz", x=np.zeros(1))
        difference.start_from(tmp_path / "d.npz")
