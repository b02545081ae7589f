#!/usr/bin/env bash
# Puts llava-cl on the path. An active environment that has the package is used as it is; otherwise .venv is made
# from constraints.txt, or used again. Run it to install, or source it from another script.
set -euo pipefail
LLAVA_CL_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_active_environment_serves() {
    [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && command -v llava-cl >/dev/null \
        && python -c 'import llava_cl, deepspeed' >/dev/null 2>&1
}

_make_venv() {
    local venv=$1 stamp=$2 wanted=$3 python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $python is older than Python 3.11; set PYTHON to a newer one." >&2
        exit 2
    }
    echo "Installing into .venv (once, some minutes) ..." >&2
    "$python" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$LLAVA_CL_ROOT/constraints.txt")
    # DeepSpeed's build asks for torch, so torch comes first and the build sees this environment.
    "${pip[@]}" torch setuptools wheel packaging py-cpuinfo
    DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation -e "${LLAVA_CL_ROOT}[train,dev]"
    echo "$wanted" > "$stamp"
}

if ! _active_environment_serves; then
    _venv=$LLAVA_CL_ROOT/.venv
    _wanted=$(cat "$LLAVA_CL_ROOT/constraints.txt" "$LLAVA_CL_ROOT/pyproject.toml" | cksum)
    if [ "$(cat "$_venv/.installed" 2>/dev/null)" != "$_wanted" ]; then
        (
            flock 9  # two first calls at once make one environment
            if [ "$(cat "$_venv/.installed" 2>/dev/null)" != "$_wanted" ]; then
                _make_venv "$_venv" "$_venv/.installed" "$_wanted"
            fi
        ) 9>"$LLAVA_CL_ROOT/.venv.lock"
    fi
    export VIRTUAL_ENV=$_venv PATH=$_venv/bin:$PATH
fi
