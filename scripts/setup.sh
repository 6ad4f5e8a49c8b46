#!/usr/bin/env bash
# Make or repair .venv in the project's folder and install the project there, editable, with the versions of
# constraints.txt.  Usage: scripts/setup.sh [EXTRA]   (EXTRA: an optional-dependencies name of pyproject.toml)
#
# Nothing is done when that was already installed from these same files: a stamp in .venv says so. While .venv is being
# changed it holds a mark instead, and a .venv found with that mark was left half-made and is made anew.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv="$root/.venv"
extra=${1:-}
stamp="$venv/.installed${extra:+-$extra}"
mark="$venv/.incomplete"

say() { printf 'setup: %s\n' "$*" >&2; }

# What an installation depends on; the folder is part of it because a venv cannot be moved.
fingerprint() {
    cat "$root/pyproject.toml" "$root/constraints.txt" "$root/scripts/setup.sh" | cksum
    printf '%s\n' "$root"
}

suits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' </dev/null >/dev/null 2>&1
}

find_python() {
    local name unfit=""
    for name in python3.12 python3.11 python3 python; do
        suits "$name" || continue
        if "$name" -c 'import ensurepip, venv' </dev/null >/dev/null 2>&1; then
            printf '%s\n' "$name"
            return
        fi
        unfit=$name
    done
    if [ -n "$unfit" ]; then
        say "$unfit cannot make virtual environments; on Debian or Ubuntu: apt-get install $unfit-venv"
    else
        say "found no Python 3.11 or 3.12 on PATH; install one (https://www.python.org/downloads/) and run this again"
    fi
    return 1
}

make_venv() {
    if [ ! -e "$mark" ] && suits "$venv/bin/python" && "$venv/bin/python" -m pip --version </dev/null >/dev/null 2>&1; then
        return
    fi
    local python
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear --without-pip "$venv" </dev/null
    touch "$mark"
    "$venv/bin/python" -m ensurepip </dev/null >/dev/null
}

pip_install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" </dev/null >&2
}

# Without an NVIDIA GPU the CPU build of torch does, and saves gigabytes of CUDA libraries.
install_cpu_torch() {
    if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then
        return
    fi
    if "$venv/bin/python" -m pip show --quiet torch </dev/null >/dev/null 2>&1; then
        return
    fi
    local torch
    torch=$(grep '^torch==' "$root/constraints.txt")
    say "no NVIDIA GPU: installing the CPU build of $torch"
    pip_install --retries 1 --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" ||
        say "the CPU build cannot be fetched; the standard build (large) is installed instead"
}

main() {
    if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]; then
        return
    fi
    make_venv
    touch "$mark"
    rm -f "$venv"/.installed*
    install_cpu_torch
    say "installing the project and its dependencies into .venv (minutes the first time)"
    pip_install -c "$root/constraints.txt" -e "$root${extra:+[$extra]}"
    fingerprint >"$venv/.installed"
    fingerprint >"$stamp"
    rm "$mark"
    say "done"
}

main
