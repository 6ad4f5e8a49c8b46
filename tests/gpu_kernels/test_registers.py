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

def compile(kernel, known, types, aligned, path, capability=90, **options):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    Path(path).write_bytes(made.asm["cubin"])
    (reader,) = Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump")
    print("SHARED:", made.metadata.shared)
    subprocess.run([reader, "--dump-resource-usage", path], check=True)
"""

RECEIVE = """
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
types = floats | whole | {"eps": "fp32"}
compile(_receive_kernel, known, types, {*floats, "d", "part_stride"}, sys.argv[3], num_warps=warps)
"""

ATTENTION = """
import torch
import triton.language as tl
from gpu_kernels.prompt_attention import _prompt_kernel, tile_for

terms, capability, dim = map(int, sys.argv[1:4])
types = {"f16": (torch.float16, tl.float16, "*fp16"), "f32": (torch.float32, tl.float32, "*fp32")}
stored, kind, own = types[sys.argv[4]]
tile = tile_for(dim, stored, terms)
floats = {"q": "*fp32", "cache": own, "table": "*i32", "positions": "*i32", "out": "*fp32"}
whole = dict.fromkeys(("q_stride", "tokens", "window"), "i32")
known = {"HEADS": 32, "KV_HEADS": 32, "HEAD_DIM": dim, "BLOCK_SIZE": 256, "ROWS": tile.rows, "KEYS": tile.keys}
known |= {"PADDED": dim, "KEY": kind, "VALUE": kind, "TERMS": terms, "SCALED": False, "WINDOWED": False}
known |= {"NATIVE": True, "scales": None}
options = {"num_warps": tile.warps, "num_stages": tile.stages}
compile(_prompt_kernel, known, floats | whole, {*floats, "q_stride"}, sys.argv[5], capability, **options)
"""

PROXY = """
from gpu_kernels.proxy import TILINGS, _passing_kernel

d, tokens = int(sys.argv[1]), int(sys.argv[2])
tiling = TILINGS["int4"]
bytes_, floats = dict.fromkeys(("gate", "up"), "*u8"), dict.fromkeys(("lengths", "x"), "*fp32")
whole = dict.fromkeys(("x_stride", "f", "groups"), "i32") | {"masks": "*i32", "threshold": "fp32"}
known = {"gate_bias": None, "up_bias": None, "KIND": "int4", "K": d, "T": tokens, "ACTIVATION": 2, "PDL": True}
known |= {"R": max(1, tiling.rows // tokens), "C": tiling.columns("int4", d)}
aligned = {*bytes_, *floats, "masks", "x_stride"}
compile(_passing_kernel, known, bytes_ | floats | whole, aligned, sys.argv[3], num_warps=tiling.warps)
"""

CERTIFY = """
from gpu_kernels.certificate import _certify_kernel
from gpu_kernels.gemv import TILINGS

d, tokens = int(sys.argv[1]), int(sys.argv[2])
tiling = TILINGS["int8"]
floats = dict.fromkeys(("slope", "rest", "x"), "*fp32") | {"w": "*u8", "masks": "*i32"}
whole = dict.fromkeys(("x_stride", "f"), "i32")
known = {"bias": None, "K": d, "T": tokens, "R": max(1, tiling.rows // tokens), "C": tiling.columns("int8", d)}
known |= {"PDL": True}
types = floats | whole | {"threshold": "fp32", "groups": "i32"}
compile(_certify_kernel, known, types, {*floats, *whole}, sys.argv[3], num_warps=tiling.warps)
"""


def compiled(script, *arguments, folder):
    """What is said of a compiled kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    file = folder / "compile.py"  # a file, as Triton reads a kernel's source
    file.write_text(COMPILE + script)
    command = [sys.executable, str(file), *map(str, arguments), str(folder / "kernel.cubin")]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def resources(script, *arguments, folder):
    """Bytes of stack and of local memory that it takes."""
    return re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", compiled(script, *arguments, folder=folder))


@pytest.mark.parametrize(("d", "parts"), [(4096, 8), (5120, 6)])
def test_the_waiting_kernel_does_not_spill(d, parts, tmp_path):
    """Parts of hot neurons and of those read over PCIe, at the width of a 7B and of a 13B model."""
    assert resources(RECEIVE, d, parts, folder=tmp_path) == [("0", "0")]


@pytest.mark.parametrize("tokens", [1, 4])
def test_naming_by_proxies_does_not_spill(tokens, tmp_path):
    assert resources(PROXY, 4096, tokens, folder=tmp_path) == [("0", "0")]


@pytest.mark.parametrize("terms", [2, 3])
def test_attention_of_a_prompt_does_not_spill(terms, tmp_path):
    """f16 keys and values of 128 each, as most models have them."""
    assert resources(ATTENTION, terms, 90, 128, "f16", folder=tmp_path) == [("0", "0")]


@pytest.mark.parametrize(
    ("terms", "head_dim", "kind"), [(2, 128, "f16"), (3, 128, "f16"), (3, 256, "f16"), (2, 256, "f32")]
)
def test_attention_of_a_prompt_fits_a_smaller_gpu(terms, head_dim, kind, tmp_path):
    """The shared memory of a program on cards such as the RTX 3090 and 4090."""
    said = compiled(ATTENTION, terms, 89, head_dim, kind, folder=tmp_path)
    assert int(re.search(r"SHARED: (\d+)", said)[1]) <= 101_376


@pytest.mark.parametrize(("d", "tokens"), [(4096, 1), (5120, 4)])
def test_certificates_do_not_spill(d, tokens, tmp_path):
    """One token and a group of four, at the width of a 7B and of a 13B model."""
    assert resources(CERTIFY, d, tokens, folder=tmp_path) == [("0", "0")]
