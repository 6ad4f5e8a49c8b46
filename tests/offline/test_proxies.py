"""Proxies of a SiLU model through the commands: the whole loop, and what a model has nothing for."""

import json

import pytest
from model_cases import make_model

from hybrid.cli import run

pytest.importorskip("transformers")


def hybrid(capfd, *arguments):
    code = run([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    texts = [f"Line {number} says that {number * 7 % 13} cats sat on {number % 5} mats. " * 3 for number in range(60)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def test_a_model_that_fires_densely_is_prepared_with_proxies(tmp_path, corpus, capfd):
    make_model("mistral-full", tmp_path)
    code, _, err = hybrid(capfd, "generate", tmp_path, "-p", "abc", "--max-new-tokens", "3")
    assert code == 0 and "note: silu fires densely" in err
    given = ("--corpus", corpus, "--tokens", "1024", "--window", "32")
    code, _, err = hybrid(capfd, "prepare", tmp_path, *given, "--target", "1%")
    assert code == 0 and "train: training" in err and "(proxy)" in err
    code, _, err = hybrid(capfd, "prepare", tmp_path, *given, "--target", "1%")
    assert code == 0 and err.count("present and current") == 3
    code, out, _ = hybrid(capfd, "eval", tmp_path, "--corpus", corpus, "--tokens", "64", "--window", "32", "--curve")
    assert code == 0 and "proxy" in out and out.count("%") > 20 and "left out" in out
    code, out, _ = hybrid(capfd, "inspect", tmp_path)
    assert code == 0 and "copies of gate and up in int4" in out and "missed mass" in out
    code, out, err = hybrid(capfd, "generate", tmp_path, "-p", "abc", "--max-new-tokens", "3")
    assert code == 0 and "fires densely" not in err and "active 100" not in err


def test_sparse_strategies_that_a_model_has_nothing_for(tmp_path, capfd):
    make_model("mistral-full", tmp_path / "silu")
    make_model("llama-relu", tmp_path / "relu")
    for command in ("place", "generate"):
        more = ("-p", "abc") if command == "generate" else ()
        code, _, err = hybrid(capfd, command, tmp_path / "silu", *more, "--sparsity", "learned")
        assert code == 2 and "silu fires densely" in err and "prox" in err
        code, _, err = hybrid(capfd, command, tmp_path / "relu", *more, "--sparsity", "proxy")
        assert code == 2 and "use certified, learned or exact" in err
    code, _, err = hybrid(capfd, "generate", tmp_path / "silu", "-p", "abc", "--sparsity", "proxy")
    assert code == 2 and "proxy.safetensors is missing; make it with: hybrid prepare" in err
