"""Every kind of artefact, cut off and with bits flipped: one `InputError`, one line, and nothing is used."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from artifact_cases import cut_off, flipped_headers, flipped_tensors, write_version_1
from bundle_cases import random_bundle, random_predictor, random_profile
from model_cases import make_model
from packed_cases import pack

from hybrid.cli import main
from hybrid.errors import InputError
from hybrid.formats.bundle import Bundle
from hybrid.formats.packed import ALIGNMENT, PACKED_FILE, PackedModel, open_packed
from hybrid.formats.packed_predictors import PREDICTORS_FILE, open_packed_predictors, open_predictors
from hybrid.model.loader import ModelFolder
from placement.placement import Placement
from predictor.bank import PredictorBank
from predictor.partial import TrainingState
from profiler import recorder
from profiler.common import artifact
from profiler.common.artifact import ArtifactHeader, TensorWriter, read_tensors, write_tensors
from profiler.common.tensor_file import Entry, Place, header_bytes, read_table, table_json
from profiler.profile import NeuronProfile

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with random artefacts, and a packed copy."""
    folder = tmp_path_factory.mktemp("made")
    make_model("llama-relu", folder / "model")
    spec = ModelFolder.open(folder / "model").spec
    random_bundle(Bundle.of(folder / "model", spec), spec)
    pack(folder / "model", folder / "packed", "int4")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def read_packed(folder):
    PackedModel.open(folder / "packed")
    with open_packed(folder / "packed") as file:
        file.check()


def read_packed_predictors(folder):
    packed = PackedModel.open(folder / "packed")
    open_predictors(folder / "packed", packed.spec, packed.order)
    with open_packed_predictors(folder / "packed", packed.spec) as file:
        file.check()


def spec_of(folder):
    return ModelFolder.open(folder / "model").spec


# What reads each kind of file, whole.
READERS = {
    "model/hybrid/profile.safetensors": lambda m: NeuronProfile.load(
        m / "model/hybrid/profile.safetensors", spec_of(m)
    ),
    "model/hybrid/predictors.safetensors": lambda m: PredictorBank.load(
        m / "model/hybrid/predictors.safetensors", spec_of(m)
    ),
    "model/hybrid/placement.safetensors": lambda m: Placement.load(
        m / "model/hybrid/placement.safetensors", spec_of(m)
    ),
    f"packed/{PACKED_FILE}": read_packed,
    f"packed/{PREDICTORS_FILE}": read_packed_predictors,
}
every_kind = pytest.mark.parametrize("name", READERS)


def refused(name, folder, what=""):
    with pytest.raises(InputError, match=name.rpartition("/")[2]) as caught:
        pytest.fail(f"{what}: {READERS[name](folder)}")
    assert "\n" not in str(caught.value)
    assert any(way in str(caught.value) for way in ("rebuild", "run: hybrid", "pack the model again"))


@every_kind
def test_cut_off_anywhere(name, copy):
    READERS[name](copy)
    for what, data in cut_off((copy / name).read_bytes()):
        (copy / name).write_bytes(data)
        refused(name, copy, what)


@every_kind
def test_a_bit_flipped_in_the_header(name, copy):
    whole = (copy / name).read_bytes()
    found = list(flipped_headers(whole))
    for what, data in found[:: len(found) // 60 + 1]:
        (copy / name).write_bytes(data)
        refused(name, copy, what)


@every_kind
def test_a_bit_flipped_in_a_tensor(name, copy):
    found = list(flipped_tensors(copy / name))
    for what, data in found[:: len(found) // 40 + 1]:
        (copy / name).write_bytes(data)
        refused(name, copy, what)


@pytest.mark.parametrize("name", list(READERS)[:3])
def test_what_prepare_would_skip_is_whole(name, copy):
    """The command that a damaged artefact names makes it anew: what it takes for current can be loaded."""
    bundle, spec, path = Bundle.of(copy / "model", spec_of(copy)), spec_of(copy), copy / name
    kind = {"profile": "neuron profile"}.get(path.stem, path.stem)
    header, tensors = read_tensors(path, kind, spec.fingerprint, "")
    assert bundle.current(path, kind, spec) == header
    write_version_1(path, header, tensors)
    assert bundle.current(path, kind, spec) == replace(header, format_version=1)
    bad = next(name for name in ("inputs", "thresholds", "hot") if name in tensors)
    write_version_1(path, header, tensors | {bad: np.full_like(tensors[bad], 10**6 if bad == "hot" else np.nan)})
    assert bundle.current(path, kind, spec) is None
    write_tensors(path, header, tensors)
    *_, (_, data) = flipped_tensors(path)
    path.write_bytes(data)
    assert bundle.current(path, kind, spec) is None


def hybrid(capfd, *arguments):
    """Run the command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code or 0, *capfd.readouterr()


def test_inspect_check_reads_packed_files_whole(copy, capfd):
    code, out, _ = hybrid(capfd, "inspect", copy / "packed")
    assert code == 0 and out.count("digests not held against the file") == 2
    code, out, err = hybrid(capfd, "inspect", copy / "packed", "--check")
    assert code == 0 and out.count("whole, by its digests") == 2 and "hybrid:" not in err
    path = copy / "packed" / PACKED_FILE
    *_, (what, data) = flipped_tensors(path)
    path.write_bytes(data)
    assert hybrid(capfd, "inspect", copy / "packed")[0] == 0
    code, out, err = hybrid(capfd, "inspect", copy / "packed", "--check")
    line = f"{path} is damaged: tensor '{what.partition(' ')[0]}' is not what was written"
    assert code == 2 and line in out and line in err.splitlines()[-1] and "whole, by its digests" in out


@pytest.mark.parametrize("name", list(READERS)[:3])
def test_inspect_check_fails_for_an_artefact_that_cannot_be_used(name, copy, capfd):
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    assert hybrid(capfd, "inspect", copy / "model")[0] == 0
    code, _, err = hybrid(capfd, "inspect", copy / "model", "--check")
    assert code == 2 and err.count("\n") == 1 and name in err
    (copy / name).unlink()
    assert hybrid(capfd, "inspect", copy / "model", "--check")[0] == 0, "what is missing is not damaged"


def test_inspect_shows_artefacts_that_do_not_say_how_they_were_made(copy, capfd):
    path = copy / "model/hybrid/profile.safetensors"
    header, tensors = read_tensors(path, "neuron profile", None, "")
    write_tensors(path, ArtifactHeader(header.kind, header.model_fingerprint), tensors)
    code, out, _ = hybrid(capfd, "inspect", copy / "model")
    assert code == 0 and "does not say how it was made ('corpus_files')" in out


def edited_packed(folder, edit, name=PACKED_FILE):
    """Write the file once more, its digests right, with `edit` applied to its JSON table of tensors."""
    path = folder / "packed" / name
    data = path.read_bytes()
    with path.open("rb") as file:
        table = read_table(file)
    base = 8 + int.from_bytes(data[:8], "little")
    entries = table_json(table.places, base)
    edit(entries)
    places = {n: Place(e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in entries.items()}
    texts = {key: text for key, text in table.metadata.items() if key != "check"}
    digests = json.loads(texts["digests"])
    texts["digests"] = json.dumps({n: digests.get(n, "") for n in places if not n.startswith("_pad.")})
    texts["check"] = artifact._check_of(texts, entries)
    path.write_bytes(header_bytes(texts, places, 4096) + data[base:])


def swap(a, b):
    def edit(entries):
        entries[a]["data_offsets"], entries[b]["data_offsets"] = entries[b]["data_offsets"], entries[a]["data_offsets"]

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        (PACKED_FILE, swap("layers.0.up", "layers.1.up"), "in the place of"),
        (PACKED_FILE, swap("layers.0.up", "layers.0.gate"), "in the place of"),
        (
            PACKED_FILE,
            lambda e: e["layers.1.up"].update(data_offsets=e["layers.0.up"]["data_offsets"]),
            "overlaps another",
        ),
        (PACKED_FILE, lambda e: e.update({"spare": e.pop("_pad.1")}), "tensor 'spare' in the place of"),
        (PACKED_FILE, lambda e: e["layers.0.up"].update(dtype="I8"), "is I8"),
        (PREDICTORS_FILE, swap("layers.0.fc1_scale", "layers.0.b1"), "in the place of"),
        (PREDICTORS_FILE, lambda e: e["layers.0.fc1"].update(shape=[6, 64]), "expected I8 .3, 128"),
        (PREDICTORS_FILE, lambda e: e["layers.0.fc2"].update(dtype="U8"), "is U8"),
        (PREDICTORS_FILE, lambda e: e["layers.1.b2"].update(dtype="I32"), "is I32"),
        (PREDICTORS_FILE, lambda e: e["thresholds"].update(shape=[1, 3]), "'thresholds' is F32"),
    ],
)
def test_tensors_of_another_place_shape_or_type_with_right_digests(name, edit, reason, copy):
    edited_packed(copy, edit, name)
    with pytest.raises(InputError, match=reason) as caught:
        READERS[f"packed/{name}"](copy)
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["thresholds", "layers.1.fc1_scale", "layers.0.b1", "layers.2.fc2_scale"])
def test_packed_predictors_that_are_not_finite(tensor, value, copy):
    """A file that says so with right digests, such as one packed from a bank that was not checked."""
    path, packed = copy / "packed" / PREDICTORS_FILE, PackedModel.open(copy / "packed")
    with open_packed_predictors(copy / "packed", packed.spec) as file:
        arrays = {name: file.array(name) for name in file.places}
        entries = [Entry(name, place.dtype, place.shape) for name, place in file.places.items()]
        header = file.header
    arrays[tensor][-1] = value
    with path.open("wb") as file:
        writer = TensorWriter(file, header, entries, ALIGNMENT)
        for name, array in arrays.items():
            writer.add(name, [array])
        writer.finish()
    with pytest.raises(InputError, match=f"tensor '{tensor}' is not all finite; pack the model again"):
        open_predictors(copy / "packed", packed.spec, packed.order)


def test_an_order_that_is_not_the_headers(copy):
    path = copy / "packed" / PACKED_FILE
    data = next(data for what, data in flipped_tensors(path) if what.startswith("order"))
    path.write_bytes(data)
    with pytest.raises(InputError, match="tensor 'order' is not what was written"):
        PackedModel.open(copy / "packed").order  # noqa: B018


def damaged(path):
    """Bytes of `path`, cut off, and with bits flipped in its header and its tensors."""
    yield from (data for _, data in cut_off(path.read_bytes()))
    headers, tensors = list(flipped_headers(path.read_bytes())), list(flipped_tensors(path))
    yield from (data for _, data in headers[:: len(headers) // 20 + 1] + tensors[:: len(tensors) // 20 + 1])


def test_what_an_interrupted_profile_left_is_begun_anew_where_it_is_damaged(copy, tmp_path):
    path, found = tmp_path / "partial", random_profile(spec_of(copy))
    recorder._save_partial(path, found.header, found.counts, found.inputs, 7)

    def resumed():
        return recorder._resume(path, found.header, np.zeros_like(found.counts), np.zeros_like(found.inputs))

    assert resumed() == 7
    for data in list(damaged(path)):
        path.write_bytes(data)
        assert resumed() == 0


def test_what_an_interrupted_training_left_is_begun_anew_where_it_is_damaged(copy, tmp_path):
    spec, origin = spec_of(copy), {"seed": 3}
    state = TrainingState.of(tmp_path / "partial", spec, origin)
    state.shares, state.predictors = [[0.5, 0.25]], [random_predictor(spec, 3)]
    assert state.save() and len(TrainingState.of(tmp_path / "partial", spec, origin).predictors) == 1
    for data in list(damaged(tmp_path / "partial")):
        (tmp_path / "partial").write_bytes(data)
        assert not TrainingState.of(tmp_path / "partial", spec, origin).shares
