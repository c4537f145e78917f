#!/bin/sh
# Makes .venv: a Python 3.12 or 3.13, uv, the pinned packages, and this project in editable form.
#
# Needs git, make, a C compiler and any Python >= 3.8; everything else it finds or fetches. A stamp in .venv makes
# the next call return at once until requirements, pyproject.toml, these scripts, or the folder's place change.
# Environment: PYTHON=/path/to/python3.12 chooses the interpreter; uv's and pip's own variables hold as usual.
set -eu

cd "$(dirname "$0")/.."
root=$(pwd -P)
requirements=requirements/dev.txt
stamp=.venv/setup.stamp

name=setup
. tools/setup_parts.sh

current_stamp() {
    { printf '%s\n' "$root"; cat "$requirements" pyproject.toml tools/setup.sh tools/setup_parts.sh; } | cksum
}

finished() {
    [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(current_stamp)" ]
}

make_environment() {
    prepare_uv
    if [ -n "${PYTHON:-}" ]; then
        usable_python "$PYTHON" || stop "PYTHON=$PYTHON: no Python 3.12 or 3.13 that runs with ssl, ctypes, bz2, lzma and \
sqlite3: name another, or leave PYTHON out"
        python=$PYTHON
    elif ! python=$(existing_python "$uv"); then
        [ "$UV_PYTHON_DOWNLOADS" != never ] || stop "no usable Python 3.12 or 3.13, and UV_PYTHON_DOWNLOADS=never forbids \
fetching one: install python3.12, or name one with PYTHON=/path/to/python3.12"
        say "no usable Python 3.12 or 3.13 found: fetching uv's own 3.12 (35 MB)"
        "$uv" python install 3.12 >&2 && python=$("$uv" python find --managed-python 3.12) || stop "fetching Python 3.12 \
failed: install it, or name one with PYTHON=/path/to/python3.12"
    fi
    say "$("$python" --version) at $python"

    if [ -n "${PYTHON:-}" ] || ! usable_python .venv/bin/python; then
        rm -rf .venv
        "$uv" venv --quiet --python "$python" .venv
    fi
    rm -f "$stamp"
    say "installing the packages of $requirements into .venv: some 3 GB to download the first time, 6 GB on disk"
    say "(most of it is torch's CUDA libraries, which its CPU path needs as well; minutes on a slow line)"
    # Where Python is told to keep nothing that it compiles, as in many containers, each process would compile all that it
    # imports: here it is done once.
    compile=${PYTHONDONTWRITEBYTECODE:+--compile-bytecode}
    "$uv" pip sync --python .venv/bin/python --require-hashes "$requirements" $compile
    say "installing megatron-distill itself, editable"
    "$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
    current_stamp > "$stamp"
    say "done"
}

finished && exit 0
mkdir -p .tools
# Two calls at once would write into the same .venv: the second waits, then finds the work done.
if [ -z "${MEGATRON_DISTILL_SETUP_LOCKED:-}" ] && command -v flock >/dev/null 2>&1; then
    MEGATRON_DISTILL_SETUP_LOCKED=1 exec flock .tools/setup.lock sh tools/setup.sh
fi
make_environment
