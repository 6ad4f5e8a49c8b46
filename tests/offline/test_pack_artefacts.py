"""The artefacts that `hybrid pack` reads and takes along: damaged ones are refused before the work, samples stay."""

import shutil

import numpy as np
import pytest
from artifact_cases import flipped_tensors
from bundle_cases import random_bundle
from model_cases import make_model
from packed_cases import pack

from hybrid.cli import main
from hybrid.console import size
from hybrid.errors import InputError
from hybrid.formats.bundle import Bundle
from hybrid.formats.packed import PACKED_FILE, Part
from hybrid.model.loader import ModelFolder
from hybrid.offline.pack import encode
from profiler.common.artifact import read_tensors, write_tensors
from profiler.profile import NeuronProfile, StoredInputs

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with random artefacts."""
    folder = tmp_path_factory.mktemp("made") / "model"
    make_model("llama-relu", folder)
    spec = ModelFolder.open(folder).spec
    random_bundle(Bundle.of(folder, spec), spec)
    return folder


@pytest.fixture
def model(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def hybrid(capfd, *arguments):
    """Run the command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code or 0, *capfd.readouterr()


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_what_is_printed_is_the_folders_size_and_samples_stay_with_the_source(dtype, model, tmp_path, capfd):
    out, spec = tmp_path / "packed", ModelFolder.open(model).spec
    source = NeuronProfile.load(model / "hybrid" / "profile.safetensors", spec)
    for state in ("wrote", "present and current:"):
        code, _, err = hybrid(capfd, "pack", model, "--dtype", dtype, "-o", out)
        assert code == 0 and f"{state} {out}, {size(bytes_in(out))} in {dtype}" in err
    found = NeuronProfile.load(out / "hybrid" / "profile.safetensors", spec)
    assert (found.frequency() == source.frequency()).all() and found.header.key == source.header.key
    assert not found.inputs.size and not found.validation.size
    samples = source.inputs.nbytes + source.documents.nbytes + source.validation.nbytes
    sizes = [(folder / "hybrid" / "profile.safetensors").stat().st_size for folder in (model, out)]
    assert samples <= sizes[0] - sizes[1] < samples + 100  # digits of places in the headers


def test_a_profile_that_is_there_is_written_again_only_where_it_differs(model, tmp_path):
    out = tmp_path / "packed"
    pack(model, out)
    path = out / "hybrid" / "profile.safetensors"
    written = path.stat().st_mtime_ns
    pack(model, out)
    assert path.stat().st_mtime_ns == written
    shutil.copy(model / "hybrid" / "profile.safetensors", path)  # as earlier versions did
    pack(model, out)
    assert not NeuronProfile.load(path, ModelFolder.open(model).spec).inputs.size


def test_damaged_weights_are_written_again(model, tmp_path):
    """As the command that `inspect --check` names for them is this one."""
    out = tmp_path / "packed"
    pack(model, out)
    whole = (out / PACKED_FILE).read_bytes()
    assert not pack(model, out).written
    *_, (_, data) = flipped_tensors(out / PACKED_FILE)
    (out / PACKED_FILE).write_bytes(data)
    assert pack(model, out).written and (out / PACKED_FILE).read_bytes() == whole
    (out / PACKED_FILE).write_bytes(whole[:-1])  # which no longer shows whose it is
    with pytest.raises(InputError, match="is not a packed copy of this model; remove it"):
        pack(model, out)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("name", ["profile", "predictors", "placement"])
def test_pack_refuses_a_damaged_artefact_before_the_work(name, dtype, model, tmp_path, capfd):
    path = model / "hybrid" / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, _, err = hybrid(capfd, "pack", model, "--dtype", dtype, "-o", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and path.name in err and "hybrid prepare" in err
    assert not (tmp_path / "out").exists()


def test_int4_wants_a_profile_that_is_whole_and_has_inputs(model, tmp_path, capfd):
    """Error feedback reads the inputs layer by layer, past the class that holds them all."""
    path, spec = model / "hybrid/profile.safetensors", ModelFolder.open(model).spec
    found = NeuronProfile.load(path, spec)
    *_, (_, data) = (damage for damage in flipped_tensors(path) if damage[0].startswith("inputs"))
    command = ["pack", model, "--dtype", "int4", "-o", tmp_path / "out"]
    path.write_bytes(data)
    code, _, err = hybrid(capfd, *command)
    assert code == 2 and "tensor 'inputs' is not what was written" in err and err.count("\n") == 1
    found.without_samples().save(path)
    code, _, err = hybrid(capfd, *command)
    assert code == 2 and "holds no FFN inputs" in err and err.count("\n") == 1
    found.save(path)
    inputs = StoredInputs.open(path, spec)
    assert inputs.count == found.inputs.shape[1]
    assert (inputs.layer(1, step=7) == found.inputs[1, ::7]).all()
    path.unlink()
    code, _, err = hybrid(capfd, *command)
    assert code == 0 and "note: no profile, so int4 is rounded plainly" in err


def test_a_part_of_a_type_that_is_not_of_weights_is_not_written():
    with pytest.raises(ValueError, match="i8 is not a type of floats"):
        encode(Part("x", (1, 2), "i8"), np.zeros((1, 2), np.float32))


def test_inputs_that_are_not_finite_are_refused_where_they_are_read_by_layer(model):
    path, spec = model / "hybrid/profile.safetensors", ModelFolder.open(model).spec
    header, tensors = read_tensors(path, "neuron profile", None, "")
    tensors["inputs"][2, 5, 7] = np.nan
    write_tensors(path, header, tensors)
    inputs = StoredInputs.open(path, spec)
    inputs.layer(1)
    with pytest.raises(InputError, match="inputs of layer 2 are not all finite; rebuild it with: hybrid profile"):
        inputs.layer(2)
