#!/usr/bin/env bash
# Lint, types and all tests (shellcheck among them, where it is installed), in two processes of one thread each; options go to pytest (-n 0 for one process).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$LLAVA_CL_ROOT"
python -c 'import pytest, xdist, hypothesis, mypy, mistral_common' || {
    echo 'error: this environment has no test tools; install them with pip install -e ".[train,dev]"' >&2
    exit 2
}
ruff check .
ruff format --check .
mypy
exec python -m pytest -n 2 --dist loadfile "$@"
