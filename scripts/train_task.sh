#!/usr/bin/env bash
# Learns and evaluates task N of a stream: Task.sh N [options of llava-cl run]
# A stage starts from the one before it, so stages before N that are not there yet are run first.
set -euo pipefail
if [[ ! "${2:-}" =~ ^[0-9]+$ ]]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
stream=$1 stage=$2
shift 2
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_stream.sh" "$stream" --until "$stage" "$@"
