#!/usr/bin/env bash
# Runs a whole stream: train_stream.sh ucit|dcl|mtil|cil [options of llava-cl run]
# LLAVA_CL_MODEL and LLAVA_CL_DATA point to the checkpoint and to the data; without them the embedded stream is run.
# METHOD names the method, and BENCHMARK another benchmark of the kind (configs/runs/BENCHMARK_METHOD.yaml).
set -euo pipefail
stream=$1
shift
benchmark=$stream method=keeplora model=LLaVA-1.5-7B
case $stream in
    mtil) benchmark=mtil_order1 model='CLIP ViT-B/16' ;;
    cil) benchmark=imagenet_r_10 method=splitlora model='ViT-B/16' ;;
esac
benchmark=${BENCHMARK:-$benchmark} method=${METHOD:-$method}
if [ -n "${LLAVA_CL_MODEL:-}" ] && [ -n "${LLAVA_CL_DATA:-}" ]; then
    run=${benchmark}_$method
    # Values of --set are YAML, where a quoted text takes any path as it is.
    quote="'"
    paths=(
        --set "model.path='${LLAVA_CL_MODEL//$quote/$quote$quote}'"
        --set "data_root='${LLAVA_CL_DATA//$quote/$quote$quote}'"
    )
elif [ -n "${LLAVA_CL_MODEL:-}${LLAVA_CL_DATA:-}" ]; then
    echo "error: set both LLAVA_CL_MODEL and LLAVA_CL_DATA for a real run, or neither for the playground." >&2
    exit 2
else
    echo "Running the embedded playground; for $model set LLAVA_CL_MODEL and LLAVA_CL_DATA to the folders of checkpoint and data."
    run=playground_${stream}_$method
    paths=()
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec llava-cl run "$LLAVA_CL_ROOT/configs/runs/$run.yaml" "${paths[@]}" "$@"
