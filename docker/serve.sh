#!/bin/sh
# usage: serve.sh EXPERIMENT FOLDER [options of `fedcore server`]
# Begins the run of an experiment in a folder, or continues it where it was interrupted; for whatever restarts services.
set -eu
experiment=$1 folder=$2
shift 2
if ls "$folder"/checkpoints/*.safetensors >/dev/null 2>&1; then
    exec fedcore server --resume "$folder" "$@"
fi
if [ -d "$folder" ] && [ -n "$(ls -A "$folder")" ]; then
    # It ended before its first checkpoint: nothing to continue, and nothing is thrown away.
    mv "$folder" "$folder-broken-off-$(date +%Y%m%dT%H%M%S)"
fi
exec fedcore server "$experiment" --out "$folder" "$@"
