#!/usr/bin/env bash
# Runs a whole stream: train_stream.sh ucit|dcl [options of llava-cl run]
# LLAVA_CL_MODEL and LLAVA_CL_DATA point to a LLaVA-1.5-7B checkpoint and to the data; METHOD names the method.
set -euo pipefail
stream=$1
shift
method=${METHOD:-keeplora}
if [ -n "${LLAVA_CL_MODEL:-}" ] && [ -n "${LLAVA_CL_DATA:-}" ]; then
    run=${stream}_$method
    paths=(--set "model.path=$LLAVA_CL_MODEL" --set "data_root=$LLAVA_CL_DATA")
elif [ -n "${LLAVA_CL_MODEL:-}${LLAVA_CL_DATA:-}" ]; then
    echo "error: set both LLAVA_CL_MODEL and LLAVA_CL_DATA for a real run, or neither for the playground." >&2
    exit 2
else
    echo "Running the embedded playground; for LLaVA-1.5-7B set LLAVA_CL_MODEL and LLAVA_CL_DATA to the folders of checkpoint and data."
    run=playground_${stream}_$method
    paths=()
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec llava-cl run "$LLAVA_CL_ROOT/configs/runs/$run.yaml" "${paths[@]}" "$@"
