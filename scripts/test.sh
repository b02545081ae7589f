#!/usr/bin/env bash
# Lint, types, shellcheck and all tests, in two processes of one thread each; options go to pytest (-n 0 for one process).
# The report is tested in Chromium; root on Debian gets it installed, and without it these tests are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$LLAVA_CL_ROOT"
python -c 'import pytest, xdist, hypothesis, mypy, mistral_common' || {
    echo 'error: this environment has no test tools; install them with pip install -e ".[train,dev]"' >&2
    exit 2
}
if ! python -c 'import sys; sys.path.insert(0, "tests/report"); import browser; sys.exit(browser.CHROMIUM is None)' \
    && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing chromium (once) ..." >&2
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } \
        >/dev/null || echo "note: chromium could not be installed; the tests that need it are skipped." >&2
fi
ruff check .
ruff format --check .
mypy
# In the order of their names, so that the long files are not the last.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
