"""What an export of PowerInfer's files wrote, opened as a model: the same tokens, predictors, counts."""

import shutil

import numpy as np
import pytest
import torch
from gguf_cases import unpacked
from model_cases import make_model
from packed_cases import pack
from powerinfer_cases import changed, prepared, read_file

from cpu_kernels.worker_pool import WorkerPool
from hybrid.errors import ModelError
from hybrid.formats.bundle import Bundle
from hybrid.formats.powerinfer import Tensor, write
from hybrid.generation import SamplingSettings
from hybrid.model.ffn import FFNRuntime
from hybrid.model.loader import ModelFolder
from hybrid.model.powerinfer_import import import_artefacts
from hybrid.model.reader import CheckpointReader
from hybrid.offline.export import bias_free, export
from hybrid.runtime.config import EngineConfig
from hybrid.runtime.devices import solve_within
from hybrid.runtime.engine import Engine
from hybrid.runtime.plan import plan_run
from placement.placement import Placement
from profiler.common.progress import no_progress

pytest.importorskip("transformers")
PROMPTS = ([5, 9, 33, 100, 2, 77], [1], [88, 14, 3])
FF, D = 85, 64


@pytest.fixture(scope="module", params=["llama-relu", "bamboo"])
def project(request, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def files(project, tmp_path_factory):
    """Exports by type; each has its own folder."""
    folder = tmp_path_factory.mktemp("exports")
    return {kind: export(project, folder / kind, kind, no_progress).model for kind in ("f16", "q4_0")}


@pytest.fixture(scope="module")
def free(project):
    """The predictors as they were before they were folded."""
    return bias_free(project, project.load_profile(), project.load_predictors(), no_progress)[0]


@pytest.fixture
def path(files, tmp_path):
    """A copy of the export of f16, with nothing of ours beside it."""
    return copy_of(files["f16"], tmp_path)


def copy_of(path, tmp_path):
    shutil.copytree(path.parent, tmp_path / "files", ignore=shutil.ignore_patterns("*.hybrid"))
    return tmp_path / "files" / path.name


def bundle_of(path):
    folder = ModelFolder.open(path)
    return folder, Bundle.of(folder.path, folder.spec)


def tokens(model, sparsity, bank=None, bundle=None):
    placement = None if bank is None else Placement.all_cold(model.spec)
    with Engine.load(model, EngineConfig(sparsity=sparsity, threads=1, bundle=bundle), placement, bank) as engine:
        greedy = SamplingSettings(temperature=0, max_new_tokens=12)
        return [[step.token for step in engine.generate(prompt, greedy)] for prompt in PROMPTS]


def test_a_file_of_f16_gives_the_tokens_of_the_folder(project, path, free, tmp_path):
    file = ModelFolder.open(path)
    assert file.spec.activation == project.spec.activation and file.spec.dtype == "f16"
    assert tokens(file, "exact") == tokens(project.folder, "exact", bundle=tmp_path / "none")
    learned = tokens(file, "learned")
    assert learned == tokens(project.folder, "learned", free)
    assert learned != tokens(file, "exact")  # random predictors leave out much


def test_down_is_mapped(path):
    view = ModelFolder.open(path).checkpoint.mapped("model.layers.1.mlp.down_proj.weight", (D, 256)).T
    assert view.flags.c_contiguous and view.shape == (256, D)
    while view.base is not None and not isinstance(view, np.memmap):
        view = view.base
    assert isinstance(view, np.memmap)


def test_a_file_of_four_bits_gives_the_tokens_of_its_numbers(files, tmp_path):
    path = copy_of(files["q4_0"], tmp_path)
    file, bundle = bundle_of(path)
    assert file.spec.dtype == "int4" and file.notices == ()
    found = {sparsity: tokens(file, sparsity) for sparsity in ("exact", "learned")}
    numbers = ModelFolder.open(unpacked(path, tmp_path / "numbers"))
    bank, none = bundle.load_predictors(file.spec), tmp_path / "none"
    assert found == {"exact": tokens(numbers, "exact", bundle=none), "learned": tokens(numbers, "learned", bank)}


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_packing_takes_all_codes_over(files, tmp_path, dtype):
    """Down's too, whose numbers are the file's to the last bit; the counts are no samples to steer int4 by."""
    path = copy_of(files["q4_0"], tmp_path)
    import_artefacts(*bundle_of(path))
    result = pack(path, tmp_path / "packed", dtype)
    assert result.errors == {}
    from cpu_kernels.blocks import dequantize

    down = ModelFolder.open(tmp_path / "packed").weights.stored("layers.1.down")
    np.testing.assert_array_equal(dequantize(down, D), read_file(path)[1]["blk.1.ffn_down_t.weight"])


def test_predictors_come_back_with_their_codes(path, free):
    plan = plan_run(ModelFolder.open(path))
    assert plan.strategy == "learned" and plan.bank.report is None
    for ours, theirs in zip(plan.bank.predictors, free.predictors, strict=True):
        assert torch.equal(ours.fc1, theirs.fc1) and torch.equal(ours.fc2[:FF], theirs.fc2)
        assert not ours.b1.any() and not ours.b2.any() and ours.threshold == 0
        assert (ours.fc2[FF:, :-1] == 0).all() and (ours.fc2[FF:, -1] == -127).all()  # those that fill up
    assert "imported the file's predictors as int8: on random inputs 100.0% of their decisions stay" in plan.notices[-1]


def test_counts_become_frequencies(project, path):
    folder, bundle = bundle_of(path)
    import_artefacts(folder, bundle)
    found, counts = bundle.load_profile(folder.spec), project.load_profile().counts
    assert np.array_equal(found.counts[:, :FF], counts) and not found.counts[:, FF:].any()
    assert found.tokens == counts.max() and found.inputs.shape == (3, 0, D)
    assert found.header.made_from["tokens"] == "not known: the largest count" and found.is_imported


def test_a_budget_is_divided_by_the_counts(path):
    folder, bundle = bundle_of(path)
    import_artefacts(folder, bundle)
    placement = solve_within(bundle, folder, "learned", 32, 2**20)
    counts = bundle.load_profile(folder.spec).counts
    for layer, order in enumerate(placement.order):
        assert (np.diff(counts[layer][order]) <= 0).all()


def test_what_is_current_is_not_written_again(path):
    folder, bundle = bundle_of(path)
    assert len(import_artefacts(folder, bundle)) == 2
    artefacts = (bundle.profile, bundle.predictors, bundle.placement)
    written = [file.stat().st_mtime_ns for file in artefacts]
    assert import_artefacts(folder, bundle) == [] and bundle.stale(folder.spec) == []
    assert [file.stat().st_mtime_ns for file in artefacts] == written
    torch.save(torch.full((256,), 9), path.parent / "activation" / "activation_0.pt")
    assert len(import_artefacts(folder, bundle)) == 1
    assert set(bundle.load_profile(folder.spec).counts[0]) == {9}
    assert [file.stat().st_mtime_ns for file in artefacts[1:]] == written[1:]


def test_what_the_user_made_stays(project, path):
    folder, bundle = bundle_of(path)
    import_artefacts(folder, bundle)
    bank, profile = bundle.load_predictors(folder.spec), bundle.load_profile(folder.spec)
    header = profile.make_header(folder.spec, {"corpus": "x"})
    type(profile)(header, profile.counts, 7000, profile.inputs, profile.documents, profile.validation).save(
        bundle.profile
    )
    bank.save(bundle.predictors, folder.spec, {"profile": header.key}, None)
    assert import_artefacts(folder, bundle) == []
    assert bundle.load_profile(folder.spec).tokens == 7000


def test_without_counts_no_neuron_is_hotter(path):
    shutil.rmtree(path.parent / "activation")
    folder, bundle = bundle_of(path)
    assert import_artefacts(folder, bundle)[0].startswith("no activation/ beside the model")
    assert (bundle.load_profile(folder.spec).frequency() == 1).all()


@pytest.mark.parametrize(
    ("metadata", "tensors", "notice"),
    [
        ({"powerinfer.sparse_threshold": 0.25}, {}, "predictors decide at 0.25 on the residual"),
        ({"powerinfer.sparse_threshold": float("nan")}, {}, "predictors decide at nan"),
        ({"powerinfer.sparse_threshold": "0"}, {}, "predictors decide at 0 on"),
        ({}, {f"blk.{layer}.fc{n}.weight": None for layer in range(3) for n in (1, 2)}, "has no predictors, so exact"),
        ({}, {"blk.1.ffn_norm.weight": np.zeros(D, np.float32)}, "so exact: layer 1: a predictor reads elements"),
    ],
)
def test_predictors_that_cannot_be_ours_leave_exact(path, tmp_path, metadata, tensors, notice):
    folder = ModelFolder.open(changed(path, path.parent / "c.gguf", metadata, tensors))
    plan = plan_run(folder)
    assert plan.strategy == "exact" and any(notice in line for line in plan.notices)
    assert tokens(folder, "exact")[0]
    assert not plan.bundle.predictors.exists() and plan.bundle.profile.is_file()


def test_a_threshold_that_is_not_said_is_zero(path):
    made = changed(path, path.parent / "c.gguf", {"powerinfer.sparse_threshold": None, "hybrid.hidden_act": None}, {})
    plan = plan_run(ModelFolder.open(made))
    assert plan.strategy == "learned" and plan.spec.activation == ("drelu" if plan.spec.family == "bamboo" else "relu")


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"blk.2.fc2.weight": None}, "has no matrix 'blk.2.fc2.weight'"),
        ({"blk.0.fc1.weight": np.ones((64, 32), np.float16)}, r"predictor 0 is \[64, 32\] and \[256, 64\], expected"),
        ({"blk.0.fc1.weight": np.full((64, D), np.nan, np.float16)}, "'blk.0.fc1.weight' has infinite numbers or NaN"),
    ],
)
def test_damaged_predictors_are_one_line(path, tensors, problem):
    if any(values is not None and np.isnan(values).any() for values in tensors.values()):
        stored = bytearray(path.read_bytes())
        tensor = ModelFolder.open(path).weights.file.tensors["blk.0.fc1.weight"]
        stored[tensor.start : tensor.start + 2] = np.float16(np.nan).tobytes()
        path.write_bytes(stored)
    else:
        changed(path, path, {}, tensors)
    with pytest.raises(ModelError, match=problem) as caught:
        plan_run(ModelFolder.open(path))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["falcon", "falcon-grouped"])
def test_a_falcon_runs_exact_as_its_norms_are_not_rms(name, tmp_path):
    """q, k and v are all of each, one after another, there; ours of the folder are the truth."""
    make_model(name, tmp_path / "model", activation="relu")
    folder = ModelFolder.open(tmp_path / "model")
    path, spec, reader = tmp_path / "f.powerinfer.gguf", folder.spec, CheckpointReader(folder.spec, folder.checkpoint)
    grouped, own = spec.n_kv_heads > 1, {}
    for layer in range(spec.n_layers):
        at, ffn = f"blk.{layer}", reader.ffn(layer)
        own |= {f"{at}.attn_qkv": reader.qkv(layer), f"{at}.attn_output": reader.out(layer)}
        own |= {f"{at}.ffn_up": (ffn.up, ffn.up_bias), f"{at}.ffn_down_t": (ffn.down, ffn.down_bias)}
        norms = {"attn_norm_2": "attention_norm", "attn_norm": "ffn_norm"} if grouped else {"attn_norm": "ffn_norm"}
        own |= {
            f"{at}.{theirs}": (reader.tensor(ours, layer), reader.vector(ours, layer)) for theirs, ours in norms.items()
        }
        own |= {f"{at}.fc1": (torch.ones(4, spec.d_model), None), f"{at}.fc2": (torch.ones(spec.d_ff, 4), None)}
    own |= {"token_embd": (reader.tensor("embedding"), None)}
    own |= {"output_norm": (reader.tensor("final_norm"), reader.vector("final_norm"))}
    tensors = [
        Tensor(f"{part}.{kind}", tuple(value.shape), "f32", value.float().contiguous().numpy)
        for part, both in own.items()
        for kind, value in zip(("weight", "bias"), both, strict=True)
        if value is not None
    ]
    sizes = {"embedding_length": spec.d_model, "feed_forward_length": spec.d_ff, "block_count": spec.n_layers}
    sizes |= {"attention.head_count": spec.n_heads, "attention.head_count_kv": spec.n_kv_heads}
    sizes |= {"context_length": spec.max_context, "attention.layer_norm_epsilon": spec.norm_eps}
    metadata = {f"falcon.{key}": value for key, value in sizes.items()}
    write(path, {"general.architecture": "falcon"} | metadata, tensors)
    opened = ModelFolder.open(path)
    assert opened.spec.activation == "relu" and opened.spec.parallel
    runtime = FFNRuntime("dense", WorkerPool(1), spec.d_model, spec.d_ff)
    ours, truth = (made.build(runtime, None, None) for made in (opened, folder))
    tokens = torch.arange(20)
    torch.testing.assert_close(ours.logits(ours(tokens)), truth.logits(truth(tokens)), rtol=1e-5, atol=1e-5)
    (tmp_path / "b").mkdir()
    notices = import_artefacts(opened, Bundle(tmp_path / "b"))
    assert any("lost its mean: exact" in notice for notice in notices)
    assert not Bundle(tmp_path / "b").predictors.exists()
