#!/usr/bin/env bash
# Lint, types, shellcheck and all tests, in two processes of one thread each; options go to pytest (-n 0 for one process).
# The report is tested in Chromium, runs over several nodes with an ssh server and network namespaces; root on Debian gets
# these installed, and without them their tests are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$LLAVA_CL_ROOT"
python -c 'import pytest, xdist, hypothesis, mypy, mistral_common' || {
    echo 'error: this environment has no test tools; install them with pip install -e ".[train,dev]"' >&2
    exit 2
}
missing=()
python -c 'import sys; sys.path.insert(0, "tests/report"); import browser; sys.exit(browser.CHROMIUM is None)' \
    || missing+=(chromium)
for tool in sshd:openssh-server ssh:openssh-client ip:iproute2; do
    PATH=$PATH:/usr/sbin command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
done
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get -qq update >/dev/null || true
    for package in "${missing[@]}"; do
        echo "Installing $package (once) ..." >&2
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$package" >/dev/null \
            || echo "note: $package could not be installed; the tests that need it are skipped." >&2
    done
fi
ruff check .
ruff format --check .
mypy
# In the order of their names, so that the long files are not the last.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
