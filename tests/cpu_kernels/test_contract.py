"""What kernels of both devices agree on: sizes of rows by hand, and that a size costs no library."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from cpu_kernels.blocks import FORMATS
from cpu_kernels.contract import FLAG_WORDS, LAYOUTS, REQUEST_WORDS, Blocks, DType, Flag, Word, padded
from cpu_kernels.row_types import ROW_TYPES


@pytest.mark.parametrize(
    ("name", "columns", "codes", "row", "elements"),
    [
        ("bf16", 33, 66, 66, 33),
        ("f16", 1, 2, 2, 1),
        ("f32", 129, 516, 516, 129),
        ("int8", 33, 128, 136, 136),
        ("int8", 129, 256, 272, 272),
        ("int4", 33, 64, 72, 72),
        ("int4", 4096, 2048, 2304, 2304),
    ],
)
def test_sizes_of_a_row(name, columns, codes, row, elements):
    layout = LAYOUTS[name]
    assert (layout.codes_bytes(columns), layout.row_bytes(columns), layout.elements(columns)) == (codes, row, elements)


def test_rows_in_blocks_are_whole_groups():
    assert [padded(columns) for columns in (1, 128, 129)] == [128, 128, 256]
    assert {name for name, layout in LAYOUTS.items() if layout.in_blocks} == set(get_args(Blocks)) == set(FORMATS)


def test_every_type_is_listed_everywhere():
    assert set(LAYOUTS) == set(get_args(DType)) == set(ROW_TYPES)
    assert all(kind.layout is LAYOUTS[name] for name, kind in ROW_TYPES.items())
    assert len({kind.array for kind in ROW_TYPES.values()}) == len(ROW_TYPES), "an array's type tells the rows' type"


def test_words_of_the_mailbox_have_room():
    assert len(set(Word)) == len(Word) and max(Word) < REQUEST_WORDS
    assert sorted(Flag) == list(range(0, FLAG_WORDS, 16)), "each in cache lines of its own"


def test_a_size_costs_no_library():
    """So that usage mistakes, and the GPU's kernels, do not wait for Numba."""
    code = "import sys, cpu_kernels.contract; print(sorted({'numpy', 'numba', 'torch', 'triton'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert ran.stdout == "[]\n"
