#!/usr/bin/env bash
# Scores every model of a run, and its base, on every task: eval_all.sh RUN [options of llava-cl eval]
# RUN is a run directory or a run file. Answers not recorded yet are asked first.
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
exec llava-cl eval "$@"
