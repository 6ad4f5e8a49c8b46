"""Model folders that are incomplete or damaged: one clear line each."""

import json
import shutil

import pytest
import torch
from model_cases import make_model
from safetensors.torch import save_file

from cpu_kernels.worker_pool import WorkerPool
from hybrid.errors import ModelError
from hybrid.formats.checkpoint import Checkpoint, read_table
from hybrid.model.ffn import FFNRuntime
from hybrid.model.loader import ModelFolder

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("llama-relu", folder, shard_size="60KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        opened = ModelFolder.open(folder)
        opened.build(FFNRuntime("dense", WorkerPool(1), opened.spec.d_model, opened.spec.d_ff), None, None)
    message = str(caught.value)
    assert "\n" not in message
    return message


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def test_the_undamaged_copy_loads(folder):
    assert ModelFolder.open(folder).spec.n_layers == 3 and len(shards(folder)) > 2


def test_missing_folder(tmp_path):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")


def test_missing_config(folder):
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", "\x00\x01"])
def test_corrupt_config(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_missing_shard(folder):
    gone = shards(folder)[1]
    gone.unlink()
    assert f"shard {gone.name} is missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(folder, keep):
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    assert shard.name in refusal(folder)


def test_random_bytes_instead_of_a_shard(folder):
    shards(folder)[0].write_bytes(bytes(range(256)) * 50)
    assert "is not a whole safetensors file" in refusal(folder)


def test_no_weights_at_all(folder):
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    assert "no weights to load" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "save the model as safetensors" in refusal(folder)


def test_index_without_a_map(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no 'weight_map'" in refusal(folder)


def test_shapes_that_contradict_the_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 84}))
    assert "has shape [85, 48], config.json asks for [84, 48]" in refusal(folder)


def test_a_tensor_that_the_config_needs_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "no tensor 'model.layers.3." in refusal(folder)


def test_a_tensor_without_a_place_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert "has tensor 'model.layers.2." in refusal(folder)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"])
def test_sizes_are_held_against_the_shapes_before_anything_is_made_of_them(folder, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: 6 * 10**8}))
    assert "has shape [" in refusal(folder) or "'head_dim' is 0" in refusal(folder)


def test_an_index_may_name_files_beside_it_only(folder, tmp_path):
    index = folder / "model.safetensors.index.json"
    for name in ("../elsewhere.safetensors", str(tmp_path / "x.safetensors"), "a\nb/c"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert "expected names of files beside it" in refusal(folder)


def test_a_tensor_in_two_shards(folder):
    shutil.copyfile(shards(folder)[0], folder / "again.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["again"] = "again.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "in two files" in refusal(folder)


ONE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
TWO = ONE | {"data_offsets": [24, 48]}


def table(path, header, data=48):
    """What `read_table` makes of a file with this header, text or JSON."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return read_table(path)


def test_a_whole_table(tmp_path):
    found = table(
        tmp_path / "a",
        {
            "__metadata__": {"format": "pt"},
            "b": TWO,
            "a": ONE,
            "none": ONE | {"shape": [0]} | {"data_offsets": [24, 24]},
        },
    )
    assert [(name, info.shape, info.end - info.start) for name, info in found.items()] == [
        *(("a", (2, 3), 24), ("none", (0,), 0), ("b", (2, 3), 24))
    ]


HOSTILE = {
    "floats": ({"a": ONE, "b": TWO | {"shape": [2.0, 3]}}, "has '2.0', expected whole numbers"),
    "NaN": ('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 24]}}', "has 'NaN', expected whole"),
    "infinite": ('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 24]}}', "has '1e999', expected"),
    "true": ({"a": ONE, "b": TWO | {"shape": [True, 6]}}, "expected dtype, shape and two data_offsets"),
    "negative": ({"a": ONE, "b": TWO | {"shape": [-2, -3]}}, "expected dtype, shape and two data_offsets"),
    "dtype is a list": ({"a": ONE | {"dtype": ["F32"]}}, "expected dtype, shape and two data_offsets"),
    "three offsets": ({"a": ONE | {"data_offsets": [0, 24, 48]}}, "expected dtype, shape and two data_offsets"),
    "offsets are text": ({"a": ONE | {"data_offsets": "ab"}}, "expected dtype, shape and two data_offsets"),
    "entry is a list": ({"a": [1]}, "expected dtype, shape and two data_offsets"),
    "header is a list": ([ONE], "its header is [{"),
    "metadata are numbers": ({"__metadata__": {"a": 1}, "a": ONE, "b": TWO}, "metadata is no table of texts"),
    "deep": ('{"a":' * 100_000, "its header nests too deeply"),
    "deep list": ('{"a":' + "[" * 900 + "]" * 900 + "}", "expected dtype, shape and two data_offsets"),
    "surrogate": ('{"\\ud800": ' + json.dumps(ONE) + "}", "surrogates not allowed"),
    "raw surrogate": ('{"\ud800": ' + json.dumps(ONE) + "}", "can't decode"),
    "twice": (f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(TWO)}}}', "names something twice"),
    "overlap": ({"a": ONE, "b": TWO | {"data_offsets": [20, 44]}}, "tensor 'b' overlaps another, or follows a gap"),
    "the same bytes": ({"a": ONE, "b": ONE}, "tensor 'b' overlaps another"),
    "gap": ({"a": ONE | {"shape": [1], "data_offsets": [0, 4]}, "b": TWO}, "tensor 'b' overlaps another, or follows a"),
    "backwards": ({"a": ONE | {"data_offsets": [24, 0]}}, "overlaps another, or follows a gap"),
    "bytes": ({"a": ONE | {"shape": [5]}, "b": TWO}, "tensor 'a' has 24 bytes, expected 20 for F32 [5]"),
    "shape of 1e30": ({"a\n": ONE | {"shape": [10**30]}, "b": TWO}, r"tensor 'a\n' has 24 bytes, expected 4000"),
    "outside": ({"a": ONE, "b": TWO | {"shape": [600], "data_offsets": [24, 2424]}}, "is truncated or padded"),
    "not utf-8": (b"\xff\xfe".decode("latin-1") + "{", "is not a whole safetensors file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_one_line(case, tmp_path):
    header, message = HOSTILE[case]
    with pytest.raises(ModelError) as caught:
        table(tmp_path / "model.safetensors", header)
    text = str(caught.value)
    assert message in text and "\n" not in text and len(text) < 600 and text.isascii()


def test_what_inspect_accepts_is_what_is_built(folder):
    """All that is wrong with tables and shapes is found by opening, not later."""
    opened = ModelFolder.open(folder)
    (shard,) = {
        info.path for name, info in opened.weights.infos.items() if name.endswith("layers.2.mlp.down_proj.weight")
    }
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    moved = next(name for name in header if name.endswith("down_proj.weight"))
    for shape in ([header[moved]["shape"][0], 1], header[moved]["shape"][::-1]):
        text = json.dumps(header | {moved: header[moved] | {"shape": shape}}).encode()
        shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(ModelError, match="down_proj"):
            ModelFolder.open(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [[1.0, -3.5, 2.0], [-0.25, -0.5, -0.0], [0.0, 0.0, 0.0], [1e-3, 6e4, -7.0]])
def test_the_largest_magnitude(dtype, values, tmp_path):
    tensor = torch.tensor(values).to(dtype)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).largest("a", (3,)) == float(tensor.float().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_named(dtype, odd, tmp_path):
    weights = {"fine": torch.randn(50, 7), "damaged": torch.randn(50, 7), "ids": torch.arange(3)}
    weights["damaged"][31, 2] = odd
    save_file(
        {name: x if name == "ids" else x.to(dtype) for name, x in weights.items()}, tmp_path / "model.safetensors"
    )
    what = "NaN" if odd != odd else "infinite numbers"
    with pytest.raises(ModelError, match=f"tensor 'damaged' has {what} among its weights"):
        Checkpoint(tmp_path).check_finite()


def test_one_tensor_twice_is_found_the_same_whatever_its_type(tmp_path):
    weight = torch.randn(3000, 4).bfloat16()
    other = weight.clone()
    other[2999, 3] += 1
    save_file({"a": weight, "b": weight.float(), "c": other, "d": weight.clone()}, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path)
    assert [found.same("a", name, (3000, 4)) for name in "bcd"] == [True, False, True]
