#!/usr/bin/env bash
# Runs a whole stream: train_stream.sh ucit|dcl [options of llava-cl run]
# LLAVA_CL_MODEL and LLAVA_CL_DATA point to a LLaVA-1.5-7B checkpoint and to the data; METHOD names the method.
set -euo pipefail
stream=$1
shift
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$LLAVA_CL_ROOT"
method=${METHOD:-keeplora}
if [ -n "${LLAVA_CL_MODEL:-}" ] && [ -n "${LLAVA_CL_DATA:-}" ]; then
    exec llava-cl run "configs/runs/${stream}_$method.yaml" \
        --set "model.path=$LLAVA_CL_MODEL" --set "data_root=$LLAVA_CL_DATA" "$@"
fi
echo "Running the embedded playground. For LLaVA-1.5-7B set LLAVA_CL_MODEL and LLAVA_CL_DATA to the checkpoint's and the data's folder."
exec llava-cl run "configs/runs/playground_${stream}_$method.yaml" "$@"
