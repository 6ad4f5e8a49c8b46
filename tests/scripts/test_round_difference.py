"""The script that rounds what training wrote."""

import sys
from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import round_difference

from hybrid.formats.difference import Difference


def test_factors_of_several_files_become_one(tmp_path):
    g = torch.Generator().manual_seed(0)
    into, out = torch.randn(2, 9, generator=g), torch.randn(5, 2, generator=g)
    save_file({"m.q.lora_a": into.bfloat16(), "m.norm.weight": torch.ones(9)}, tmp_path / "0.safetensors")
    save_file({"m.q.lora_b": out.bfloat16()}, tmp_path / "1.safetensors")
    paths = [str(tmp_path / name) for name in ("0.safetensors", "1.safetensors", "d.npz")]
    done = CliRunner().invoke(round_difference.main, [*paths, "--bits", "8"])
    assert done.exit_code == 0 and done.output.startswith(f"wrote {paths[-1]}, ")
    found = Difference.load(tmp_path / "d.npz")
    change, wanted = found.applied("m.q", torch.zeros(5, 9)), out.bfloat16().float() @ into.bfloat16().float()
    assert float((change - wanted).norm() / wanted.norm()) < 0.015
    assert found.applied("m.norm", torch.zeros(9)).equal(torch.ones(9)) and not found.unused
