"""What generation_config.json and config.json say of answers: settings, end tokens, and values that cannot be used."""

import json

import pytest

from hybrid.errors import ModelError
from hybrid.formats.bundle import EMBEDDED_MODEL
from hybrid.formats.generation_config import generation_defaults
from hybrid.generation import SamplingSettings


def defaults(folder, config=None, **values):
    (folder / "config.json").write_text(json.dumps(config or {}))
    (folder / "generation_config.json").write_text(json.dumps(values))
    return generation_defaults(folder)


def test_the_embedded_model():
    found = generation_defaults(EMBEDDED_MODEL)
    assert found.settings == SamplingSettings(temperature=0.7, top_k=40, top_p=0.95, max_new_tokens=256)
    assert found.end_tokens == (1, 2) and found.notes == ()


def test_greedy_without_a_file(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    found = generation_defaults(tmp_path)
    assert found.settings == SamplingSettings(temperature=0, top_k=0, top_p=1.0) and found.end_tokens == (7,)


def test_end_tokens_of_both_files(tmp_path):
    assert defaults(tmp_path, {"eos_token_id": [7, 5]}, eos_token_id=5).end_tokens == (5, 7)
    assert defaults(tmp_path, {"eos_token_id": None}, eos_token_id=[5, 0]).end_tokens == (5, 0)


@pytest.mark.parametrize("value", ["2", True, 2.0, [1, "2"], {}])
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_end_tokens_that_are_no_ids(name, value, tmp_path):
    files = {"config": {}, "generation_config": {}} | {name: {"eos_token_id": value}}
    with pytest.raises(ModelError, match=rf"{tmp_path}.{name}\.json: eos_token_id is .*, expected token ids"):
        defaults(tmp_path, files["config"], **files["generation_config"])


def test_values_that_greedy_does_not_use_are_passed_over(tmp_path):
    found = defaults(tmp_path, do_sample=False, temperature=-1.0, top_p=0.0, top_k=-1, min_p=2)
    assert found.settings == SamplingSettings(temperature=0, top_k=0, top_p=1.0) and found.notes == ()


def test_values_that_cannot_be_used_are_named_and_replaced(tmp_path):
    found = defaults(tmp_path, do_sample=True, temperature=0.5, top_p=0.0, max_new_tokens=-1)
    assert found.settings == SamplingSettings(temperature=0.5, top_k=0, top_p=1.0, max_new_tokens=512)
    assert found.notes == (
        "generation_config.json: top_p is 0.0, expected a number above 0, at most 1 (off); 1.0 is taken",
        "generation_config.json: max_new_tokens is -1, expected an integer, 1 or more; 512 is taken",
    )
    found = defaults(tmp_path, do_sample="yes", temperature=0.5)
    assert found.settings.greedy and "do_sample is 'yes', expected true or false" in found.notes[0]
