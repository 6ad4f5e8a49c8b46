"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    """Tests run on small machines, beside each other's worker pools."""
    torch.set_num_threads(2)
