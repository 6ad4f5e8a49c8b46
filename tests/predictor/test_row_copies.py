"""Copies of rows come back as they were made, and others than are needed are refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from predictor_cases import small_spec

from predictor.row_copies import CopyForm, LayerCopies, RowCopies, write_copies
from profiler.common.errors import ArtifactError, ArtifactMismatchError, InputError

SPEC = small_spec()
CERTIFIED, BOTH = CopyForm.certified(SPEC), CopyForm(("gate", "up"), "int4")


def weights(layer: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(layer)
    shape = SPEC.d_ff, SPEC.d_model
    return {part: (scale * random.standard_normal(shape)).astype(np.float32) for part in ("gate", "up")}


def layers(form: CopyForm) -> Iterator[LayerCopies]:
    return (form.layer(weights(layer)) for layer in range(SPEC.n_layers))


@pytest.mark.parametrize("form", [CERTIFIED, BOTH], ids=["certified", "both in int4"])
def test_copies_come_back_from_their_file(form: CopyForm, tmp_path: Path):
    done: list[int] = []
    write_copies(tmp_path / "copies", SPEC, form, {}, layers(form), done.append)
    found = RowCopies.load(tmp_path / "copies", SPEC, form)
    assert sum(done) == len(found.layers) == SPEC.n_layers
    for ours, made in zip(found.layers, layers(form), strict=True):
        assert ours.nbytes == made.nbytes == form.layer_bytes(SPEC)
        for part, expected in ((ours.gate, made.gate), (ours.up, made.up)):
            assert (part is None) == (expected is None)
            assert part is None or expected is None or (part.rows == expected.rows).all()
        assert (ours.slope is None) == (not form.bounded)
        if ours.slope is not None and made.slope is not None:
            np.testing.assert_array_equal(ours.slope, made.slope)


def test_reordered_copies_are_those_of_reordered_neurons():
    order = np.random.default_rng(3).permutation(SPEC.d_ff)
    found = CERTIFIED.layer(weights(0)).reordered(order)
    expected = CERTIFIED.layer({part: rows[order] for part, rows in weights(0).items()})
    np.testing.assert_array_equal(found.deciding.rows, expected.deciding.rows)
    np.testing.assert_array_equal(found.rest, expected.rest)


def test_another_form_another_model_and_damage_are_refused(tmp_path: Path):
    path = tmp_path / "copies"
    with pytest.raises(ArtifactError, match="missing; make it with: hybrid certify"):
        RowCopies.load(path, SPEC, CERTIFIED)
    write_copies(path, SPEC, CERTIFIED, {}, layers(CERTIFIED))
    with pytest.raises(ArtifactError, match="other copies than are needed"):
        RowCopies.load(path, SPEC, BOTH)
    with pytest.raises(ArtifactMismatchError):
        RowCopies.load(path, replace(SPEC, fingerprint="another"), CERTIFIED)
    broken = [replace(layer, rest=np.full(SPEC.d_ff, np.nan, np.float32)) for layer in layers(CERTIFIED)]
    write_copies(path, SPEC, CERTIFIED, {}, broken)
    with pytest.raises(ArtifactError, match="a bound of layer 0 is no number"):
        RowCopies.load(path, SPEC, CERTIFIED)


def test_weights_that_blocks_cannot_hold_are_refused():
    with pytest.raises(InputError, match="rows of gate cannot be copied"):
        CERTIFIED.layer(weights(0, 1e5))
