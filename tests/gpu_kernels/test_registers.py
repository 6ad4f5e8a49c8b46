"""Registers of compiled kernels, without a GPU: spills take local memory for every thread that the card can run, which
no plan counts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpu_kernels.mailbox import _POLLING_WARPS, _receive_kernel
from gpu_kernels.norm import row_sizes

d, parts = int(sys.argv[1]), int(sys.argv[2])
floats = dict.fromkeys(("x", "parts", "host", "weight", "out"), "*fp32")
whole = dict.fromkeys(("d", "part_stride"), "i32") | {"flags": "*i64", "state": "*i64", "timeout": "i64"}
sizes = row_sizes(d, _POLLING_WARPS, sums=True) | {"PDL": True}
warps = sizes.pop("num_warps")
sizes.pop("launch_pdl", None)
known = {"added": None, "bias": None, "PARTS": parts, "ADDED": False, "ASKED": True, "SEVERAL": True, "REPLACE": False}
known |= {"NORM": 0, "NATIVE": True} | sizes
types = floats | whole | {"eps": "fp32"} | dict.fromkeys(known, "constexpr")
signature = {name: types[name] for name in _receive_kernel.arg_names}
aligned = {*floats, "d", "part_stride"}
attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
source = ASTSource(fn=_receive_kernel, signature=signature, constexprs=known, attrs=attributes)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
path = Path(sys.argv[3])
path.write_bytes(made.asm["cubin"])
(reader,) = Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump")
subprocess.run([reader, "--dump-resource-usage", path], check=True)
"""


@pytest.mark.parametrize(("d", "parts"), [(4096, 8), (5120, 6)])
def test_the_waiting_kernel_does_not_spill(d, parts, tmp_path):
    """Parts of hot neurons and of those read over PCIe, at the width of a 7B and of a 13B model."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    script = tmp_path / "compile.py"  # a file, as Triton reads a kernel's source
    script.write_text(COMPILE)
    command = [sys.executable, str(script), str(d), str(parts), str(tmp_path / "kernel.cubin")]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", ran.stdout) == [("0", "0")], ran.stdout
