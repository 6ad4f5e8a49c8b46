"""How many threads tests use to which their number is of no account: where two processes of tests share two cores, a
second thread waits for the other process at every small operation."""

import os

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
