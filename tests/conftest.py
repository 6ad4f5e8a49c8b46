"""What all tests share."""

import os

import pytest
import torch
from few_threads import THREADS

# Before any kernel is defined: without a GPU, Triton's interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    """Tests run on small machines, beside each other's worker pools."""
    torch.set_num_threads(THREADS)
