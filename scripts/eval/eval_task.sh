#!/usr/bin/env bash
# Scores one model of a run on one task: eval_task.sh RUN STAGE TASK [options of llava-cl eval]
# RUN is a run directory or a run file; stage 0 is the untouched base model. Answers not recorded yet are asked first.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
run=$1 stage=$2 task=$3
shift 3
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
exec llava-cl eval "$run" --stage "$stage" --task "$task" "$@"
