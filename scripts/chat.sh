#!/usr/bin/env bash
# Chat with the embedded model: set up .venv, prepare the model (profile, train, place) and open the chat.
# What is already done is skipped.  Usage: scripts/chat.sh [OPTION of `hybrid chat`]...
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh"
# Standard input and output belong to the chat alone.
# The budget is smaller than the model, so that hot and cold neurons are both at work. `prepare` itself skips what is
# current; not starting it at all, while its last artefact is newer than its inputs, saves two seconds.
model="$root/hybrid/embedded/model"
placement="$model/hybrid/placement.safetensors"
if ! [ "$placement" -nt "$model/model.safetensors" ] || ! [ "$placement" -nt "$model/../corpus/calibration.jsonl" ]; then
    "$root/.venv/bin/hybrid" prepare --vram-budget 40MiB </dev/null >&2
fi
exec "$root/.venv/bin/hybrid" chat "$@"
