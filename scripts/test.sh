#!/usr/bin/env bash
# Set up .venv with the test dependencies and run the tests.
# Usage: scripts/test.sh [ARGUMENT of pytest]...   (paths are relative to the project's folder)
# Two processes, a file of tests to one of them: most of the time goes to compiling kernels, one thread each.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" test
cd "$root"
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
