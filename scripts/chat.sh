#!/usr/bin/env bash
# Chat with the embedded model: set up .venv, prepare the model (profile, train, place) and open the chat.
# What is already done is skipped.  Usage: scripts/chat.sh [OPTION of `hybrid chat`]...
# --vram-budget, --context, --threads and --bundle are handed on to `hybrid prepare`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
hybrid="$root/.venv/bin/hybrid"
model="$root/hybrid/embedded/model"
bundle="$model/hybrid"

# Standard input and output belong to the chat alone.
"$root/scripts/setup.sh" </dev/null >&2

prepare=(prepare)
# Less than the model takes, so that hot and cold neurons are both at work; without a GPU none is hot.
if nvidia-smi -L </dev/null >/dev/null 2>&1; then
    prepare+=(--vram-budget=40MiB)
fi
option="" asked=""
for argument in "$@"; do
    if [ -n "$option" ]; then
        argument="$option=$argument" option=""
    fi
    case $argument in
        -h | --help) exec "$hybrid" chat --help ;;
        --vram-budget | --context | --threads | --bundle) option=$argument ;;
        --vram-budget=* | --context=*) asked+="$argument " prepare+=("$argument") ;;
        --threads=*) prepare+=("$argument") ;;
        --bundle=*) bundle=${argument#*=} prepare+=("$argument") ;;
    esac
done

# `prepare` itself skips what is current. Not starting it at all saves two seconds: where the last that it makes is newer
# than its inputs, and this script was last asked for the same budget and context.
placement="$bundle/placement.safetensors"
if ! [ "$placement" -nt "$model/model.safetensors" ] || ! [ "$placement" -nt "$model/../corpus/calibration.jsonl" ] ||
    [ "$asked" != "$(cat "$bundle/chat.options" 2>/dev/null)" ]; then
    "$hybrid" "${prepare[@]}" </dev/null >&2
    printf '%s' "$asked" 2>/dev/null >"$bundle/chat.options" || true
fi
exec "$hybrid" chat "$@"
