"""`check_equal.py`: equal logits and answers are exit code 0, a loss is found and is 1."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from model_cases import make_model

from hybrid.console import progress
from hybrid.model.ffn import HybridFFN
from hybrid.offline.certify import certify
from hybrid.offline.project import Project

pytest.importorskip("transformers")


def test_no_loss_and_a_loss(tmp_path, monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    import check_equal

    monkeypatch.setattr(check_equal, "_ANSWER", 8)
    make_model("llama-relu", tmp_path / "model", vocab_size=131, max_position_embeddings=128)
    certify(Project(tmp_path / "model", None, 1, progress), progress)
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 122, 400)))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    asked = [str(tmp_path / "model"), "--corpus", str(tmp_path / "text.txt"), "--tokens", "160", "--window", "40"]
    asked += ["--answers", "2", "--threads", "1"]
    result = CliRunner().invoke(check_equal.main, asked, catch_exceptions=False)
    found = json.loads(result.output.splitlines()[-1])
    assert result.exit_code == 0 and found["tokens"] >= 120 and found["answers"] == 2
    assert found["logits_differ"] == found["likeliest_differ"] == found["answers_differ"] == 0

    take = HybridFFN.set_copies

    def wrong(ffn, copies):
        """Bounds that are far too low leave neurons out that fire."""
        take(ffn, copies)
        ffn.certificate.rest[:] = -1.0

    monkeypatch.setattr(HybridFFN, "set_copies", wrong)
    result = CliRunner().invoke(check_equal.main, asked, catch_exceptions=False)
    assert result.exit_code == 1 and json.loads(result.output.splitlines()[-1])["logits_differ"] > 0
