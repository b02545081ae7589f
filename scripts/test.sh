#!/usr/bin/env bash
# Lint, types and all tests; options go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$LLAVA_CL_ROOT"
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
