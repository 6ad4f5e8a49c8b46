"""The synthetic models: they load, fire as asked, and their predictors are exact; bad input gives one clear line."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from cpu_kernels.blocks import dequantize, quantize
from hybrid import Engine, EngineConfig, SamplingSettings
from hybrid.formats.text import TextCodec
from hybrid.offline.project import Project
from placement.placement import Placement
from predictor.bank import PredictorBank
from profiler.common.errors import InputError
from profiler.profile import NeuronProfile

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = {"d_model": 64, "d_ff": 192, "layers": 2, "heads": 4, "vocab": 300, "context": 64, "predictor_rank": 32}
AWKWARD = {
    "bf16": SMALL | {"kv_heads": 2},
    "f16": {"d_model": 48, "d_ff": 17, "layers": 3, "heads": 3, "vocab": 262, "context": 17, "dtype": "f16"},
    "f32": {"d_model": 90, "d_ff": 301, "layers": 1, "heads": 5, "kv_heads": 1, "vocab": 513, "dtype": "f32"},
    "low-rank": SMALL | {"predictor_rank": 3, "layers": 1},
    "odd-rank": SMALL | {"predictor_rank": 27, "firing_share": 0.4},
}
GREEDY = SamplingSettings(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module, after those beside it that it imports; `scripts` is a folder of programs."""
    names = ("train_tiny", "synthetic_model", "make_synthetic")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these matrices are too small to share out
    for name in names:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def construction(script: ModuleType) -> ModuleType:
    return sys.modules["synthetic_model"]


@pytest.fixture(scope="module")
def make(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a model of the small shape and return its folder; keywords go to `SyntheticConfig`."""

    def make_model(**settings) -> Path:
        out = tmp_path_factory.mktemp("synthetic") / "out"
        script.make_synthetic(script.SyntheticConfig(**settings), out)
        return out

    return make_model


@pytest.fixture(scope="module")
def small(make: Callable[..., Path]) -> Path:
    return make(**SMALL)


def project_of(folder: Path) -> Project:
    return Project(folder, None, 1, None)


def greedy(folder: Path, sparsity: str, bank: PredictorBank | None = None) -> list[list[int]]:
    """Tokens of two prompts."""
    engine = Engine.load(folder, EngineConfig(sparsity, threads=1), bank=bank)
    found = [[step.token for step in engine.generate(prompt, GREEDY)] for prompt in ([7, 40, 199], [250])]
    engine.close()
    return found


@pytest.mark.parametrize("case", AWKWARD)
def test_exact_and_learned_give_the_tokens_of_dense(make, case):
    folder = make(**AWKWARD[case])
    dense = greedy(folder, "dense")
    assert all(len(tokens) == GREEDY.max_new_tokens for tokens in dense)
    assert len({token for tokens in dense for token in tokens}) > 6, "a constant answer would show nothing"
    assert greedy(folder, "exact") == dense
    assert greedy(folder, "learned") == dense


def test_tokens_depend_on_what_the_predictor_says(small):
    bank = project_of(small).load_predictors()
    nothing = bank.with_thresholds([1e9] * len(bank.predictors))
    assert greedy(small, "learned", nothing) != greedy(small, "dense")


@pytest.mark.parametrize("case", AWKWARD)
def test_predictors_are_exact_on_tokens_never_seen(make, case):
    folder = make(**AWKWARD[case])
    project = project_of(folder)
    bank = project.load_predictors()
    tokens = torch.from_numpy(np.random.default_rng(1).integers(6, project.spec.vocab_size, 17))
    seen = []
    for ffn in project.model.ffns:
        ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    project.model(tokens)
    assert len(seen) == project.spec.n_layers
    for layer, (x, predictor) in enumerate(zip(seen, bank.predictors, strict=True)):
        gate = x.double() @ project.folder.ffn_tensors(layer).gate.double().T
        torch.testing.assert_close(predictor.logits(x).double(), gate, rtol=0, atol=1e-4)
        assert predictor.mask(x)[gate > 0].all()
        assert (predictor.mask(x) & (gate <= -0.011)).sum() == 0


def test_report_is_of_exact_predictors(small):
    report = project_of(small).load_predictors().report
    assert [line.recall for line in (*report.layers, report.overall)] == [1.0] * 3
    assert report.overall.missed_mass == 0
    assert 1 <= report.overall.active_ratio < 1.05
    assert report.overall.rank == 64 and report.tokens == 1024
    assert json.loads((small / "hybrid" / "predictors.json").read_text()) == json.loads(report.to_json())


@pytest.mark.parametrize(("share", "skew"), [(0.1, 0.7), (0.03, 0.0), (0.3, 1.5)])
def test_neurons_fire_as_asked_on_other_tokens(make, share, skew):
    folder = make(**SMALL | {"d_ff": 1000, "firing_share": share, "skew": skew, "predictor_rank": 64})
    project = project_of(folder)
    fired: list[list[torch.Tensor]] = [[], []]
    for layer, ffn in enumerate(project.model.ffns):
        ffn.act.register_forward_hook(lambda _, __, out, layer=layer: fired[layer].append(out.float()))
    project.runtime.keep_fired = True
    generator = np.random.default_rng(5)
    for _ in range(16):
        project.model(torch.from_numpy(generator.integers(6, 300, 64)))
    frequency = torch.stack([torch.cat(outputs).mean(dim=0) for outputs in fired]).numpy()
    assert frequency.shape == (2, 1000)
    assert frequency.mean(axis=1) == pytest.approx(share, rel=0.15)
    # Neurons by the stored profile's order, so that their own noise does not sort them: the power law must show.
    order = np.argsort(-project.load_profile().frequency(), axis=1)
    in_order = np.take_along_axis(frequency, order, axis=1).mean(axis=0)
    law = (np.arange(1000) + 10.0) ** -skew
    tenths, wanted = in_order.reshape(10, -1).mean(axis=1), law.reshape(10, -1).mean(axis=1)
    unclipped = slice(2, 10) if skew < 1 else slice(5, 9)
    ratio = (tenths[unclipped][0] / tenths[unclipped][-1]) / (wanted[unclipped][0] / wanted[unclipped][-1])
    assert 0.7 < ratio < 1.6


def test_designed_rates_follow_the_law_between_their_bounds(script, construction):
    config = script.SyntheticConfig(**SMALL | {"d_ff": 5000, "firing_share": 0.1, "skew": 0.7})
    rates = construction.designed_rates(config, 1024)
    assert rates.mean() == pytest.approx(0.1, rel=1e-6)
    assert (np.diff(rates) <= 0).all() and rates.max() <= 1 - 1 / 1024 and rates.min() >= 1 / 1024
    assert rates[3990] / rates[990] == pytest.approx(4**-0.7)


def test_bias_sets_the_rate_on_the_tokens_that_it_was_set_on(construction):
    generator = torch.Generator().manual_seed(3)
    gate, x0 = torch.randn(200, 5, generator=generator), torch.rand(200, generator=generator) + 1
    rates = torch.tensor([0.005, 0.1, 0.5, 0.995, 1.0])
    bias = construction.bias_for_rates(gate, x0, rates)
    fired = (gate + bias * x0[:, None] > 0).float().mean(dim=0)
    torch.testing.assert_close(fired, torch.tensor([0.005, 0.1, 0.5, 0.995, 0.995]))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x [t, n], n a multiple of 32, as kernels round their inputs: to 16 bits, each block of 32 by its largest."""
    blocks = x.unflatten(1, (-1, 32))
    step = blocks.abs().amax(2, keepdim=True) / 32767
    return torch.where(step == 0, 0, (blocks / step).round() * step).flatten(1)


def test_no_firing_is_missed_when_activations_are_rounded(construction):
    generator = torch.Generator().manual_seed(0)
    d, f, k, rank = 2048, 300, 127, 256
    x = torch.randn(300, d, generator=generator)
    x[:, 0] = d**0.5 / 4
    calibration, x = torch.nn.functional.rms_norm(x, (d,)).chunk(2)
    places = torch.rand(f, k, generator=generator).topk(7).indices
    signs, b = (torch.randn(shape, generator=generator).sign() for shape in ((f, 7), (k, d)))
    b[:, :32] = 0
    rates = torch.linspace(0.01, 0.99, f)
    gate, predictor = construction.exact_gate(places, signs, b, rank, calibration, rates)
    fired = rounded(x) @ gate.T > 0
    hidden = rounded((rounded(x) @ predictor.fc1.float().T * predictor.fc1_scale).relu_())
    logits = hidden @ predictor.fc2.float().T * predictor.fc2_scale
    assert (logits - x @ gate.T).abs().max() < abs(predictor.threshold) / 2
    assert (logits >= predictor.threshold)[fired].all()
    assert fired.float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("case", AWKWARD)
def test_the_gate_is_exact_in_blocks(make, case, kind):
    folder = project_of(make(**AWKWARD[case])).folder
    for layer in range(AWKWARD[case]["layers"]):
        gate = folder.ffn_tensors(layer).gate.float().numpy()
        assert (gate[:, 1:32] == 0).all() and (gate[:, 32:] != 0).any()
        np.testing.assert_array_equal(dequantize(quantize(gate, kind), gate.shape[1]), gate)


def test_one_residual_coordinate_is_constant(small):
    shards = sorted(small.glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert json.loads((small / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: path.name for path in shards for name in load_file(path)},
    }
    assert tensors["model.embed_tokens.weight"][:, 0].unique().numel() == 1
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert (tensor[0] == 0).all() and (tensor[1:] != 0).any(), name
    assert (tensors["model.layers.0.mlp.gate_proj.weight"][:, 0] != 0).float().mean() > 0.9


def test_profile_matches_the_model_and_can_train_predictors(small):
    project = project_of(small)
    found = project.load_profile()
    assert found.counts.shape == (2, 192) and found.tokens == 1024
    assert found.inputs.shape == (2, 256, 64) and len(np.unique(found.documents)) == 16
    assert found.validation.shape == (16, 64)
    assert found.header.made_from["firing_share"] == 0.1
    gate = project.folder.ffn_tensors(0).gate.float()
    shares = (torch.from_numpy(found.inputs[0]).float() @ gate.T > 0).float().mean(dim=0).numpy()
    assert np.abs(shares - found.frequency()[0]).mean() < 0.03  # the sample is a quarter of the tokens counted


@pytest.mark.parametrize(("budget", "size"), [("0", 0), ("1MiB", 2**20)])
def test_placement_is_made_from_the_profile_for_the_budget_asked(script, tmp_path, budget, size):
    script.make_synthetic(script.SyntheticConfig(**SMALL), tmp_path / "out", budget)
    project = project_of(tmp_path / "out")
    placement = Placement.load(tmp_path / "out" / "hybrid" / "placement.safetensors", project.spec)
    assert (placement.made_from["vram_budget"], placement.made_from["strategy"]) == (size, "learned")
    assert placement.made_from["profile"] == project.load_profile().header.key
    in_order = np.take_along_axis(project.load_profile().frequency(), placement.order.astype(int), axis=1)
    assert (np.diff(in_order, axis=1) <= 0).all()


def test_the_same_seed_gives_the_same_files(make, small):
    again, other = make(**SMALL), make(**SMALL | {"seed": 1})
    # A placement records how long it took to solve.
    names = sorted(str(path.relative_to(small)) for path in small.rglob("*") if path.is_file())
    assert len(names) == 12
    same = [name for name in names if (again / name).read_bytes() == (small / name).read_bytes()]
    assert set(names) - set(same) <= {"hybrid/placement.safetensors"}
    changed = {name for name in names if (other / name).read_bytes() != (small / name).read_bytes()}
    assert changed >= {name for name in names if name.endswith(".safetensors")}


def test_every_id_decodes_and_text_comes_back(small):
    codec = TextCodec(small, 300)
    assert all(codec.decode([token]) for token in range(6, 300))
    assert codec.decode([262, 299]) == " w0 w37"
    assert codec.decode(codec.encode("Grüße, 世界\n")) == "Grüße, 世界\n"
    chat = codec.encode_chat([{"role": "user", "content": "hi"}])
    assert chat[:2] == [0, 2] and chat[-1] == 3 and len(chat) == 5


def test_reads_in_transformers(small):
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    model = project_of(small).model
    ids = torch.tensor([5, 17, 299, 0, 1])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)), reference(ids[None]).logits[0], rtol=1e-4, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(small)("hi").input_ids == TextCodec(small, 300).encode("hi")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("heads", "3"),
        ("heads", "0"),
        ("heads", "64"),
        ("kv-heads", "3"),
        ("vocab", "261"),
        ("layers", "0"),
        ("context", "15"),
        ("firing-share", "0"),
        ("firing-share", "nan"),
        ("skew", "-1"),
        ("predictor-rank", "2"),
        ("seed", "-1"),
        ("vram-budget", "-1GiB"),
    ],
)
def test_command_line_refuses_bad_values_in_one_line(script, tmp_path, option, value):
    settings = {name.replace("_", "-"): str(number) for name, number in SMALL.items()} | {option: value}
    arguments = [f"--{name}={text}" for name, text in settings.items()]
    result = CliRunner().invoke(script.main, [f"--out={tmp_path / 'new' / 'out'}", *arguments])
    assert result.exit_code == 2
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_command_line_prints_what_was_measured(script, tmp_path):
    arguments = [f"--{name.replace('_', '-')}={number}" for name, number in SMALL.items()]
    result = CliRunner().invoke(script.main, [f"--out={tmp_path / 'out'}", *arguments])
    assert result.exit_code == 0, result.output
    assert "hottest 10% cover" in result.stdout and "recall" in result.stdout
    assert result.stdout.endswith(f"wrote {tmp_path / 'out'}\n")
    assert NeuronProfile.load(tmp_path / "out" / "hybrid" / "profile.safetensors", None).tokens == 1024


def test_gguf_is_written_beside_the_model(script, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "gguf_model", SimpleNamespace(write_gguf=lambda *given: calls.append(given)))
    arguments = [f"--{name.replace('_', '-')}={number}" for name, number in SMALL.items()]
    out = tmp_path / "out"
    result = CliRunner().invoke(script.main, [f"--out={out}", "--gguf=f16", "--gguf=q4_0", *arguments])
    assert result.exit_code == 0, result.output
    assert calls == [(out, out / "model-f16.gguf", "f16"), (out, out / "model-q4_0.gguf", "q4_0")]


def test_existing_output_is_left_alone(script, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        script.make_synthetic(script.SyntheticConfig(**SMALL), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_seen_before_the_work(script, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(InputError, match=r"needs .* KiB, .* are free"):
        script.make_synthetic(script.SyntheticConfig(**SMALL), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_leaves_nothing(script, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("stop")

    monkeypatch.setattr(script, "quality_report", fail)
    with pytest.raises(RuntimeError, match="stop"):
        script.make_synthetic(script.SyntheticConfig(**SMALL), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_silu_model_lets_the_share_pass_that_was_asked_for(script: ModuleType, tmp_path: Path) -> None:
    config = script.SyntheticConfig(**SMALL, activation="silu", firing_share=0.4)
    _, bank = script.make_synthetic(config, tmp_path / "model")
    assert bank.frequency().mean(axis=1) == pytest.approx([0.4, 0.4], abs=0.03)
    with Engine.load(tmp_path / "model", EngineConfig(threads=1, vram_budget=0)) as engine:
        assert engine.plan.strategy == "proxy"
        stats = [step.stats for step in engine.generate("abc", GREEDY)][-1]
        counters = engine.runtime.counters
        assert stats is not None and 0.3 < counters.computed / counters.neurons < 0.5
