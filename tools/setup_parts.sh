# What tools/setup.sh and tools/setup_sglang.sh share; sourced, in the project's root, after `say` knows its name.

say() { printf '%s: %s\n' "$name" "$*" >&2; }
stop() { say "$*"; exit 1; }

# An interpreter counts only if it runs (a pyenv shim may refuse) and has what the packages import.
usable_python() {
    "$1" -c '
import sys
import bz2, ctypes, lzma, sqlite3, ssl
sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

existing_python() {
    for candidate in python3.12 python3.13 python3 python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if usable_python "$candidate"; then command -v "$candidate"; return 0; fi
    done
    # pyenv keeps interpreters that are not on PATH: the newest patch of 3.12 first.
    for versions in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null || true)" "${HOME:-}/.pyenv"; do
        [ -d "$versions/versions" ] || continue
        for minor in 3.12 3.13; do
            for patch in $(ls "$versions/versions" | sed -n "s/^$minor\.\([0-9]*\)\$/\1/p" | sort -rn); do
                candidate=$versions/versions/$minor.$patch/bin/python
                if usable_python "$candidate"; then printf '%s\n' "$candidate"; return 0; fi
            done
        done
    done
    for minor in 3.12 3.13; do
        candidate=$("$1" python find --no-python-downloads "$minor" 2>/dev/null) || continue
        if usable_python "$candidate"; then printf '%s\n' "$candidate"; return 0; fi
    done
    return 1
}

usable_uv() { "$1" pip sync --help 2>/dev/null | grep -q -e --require-hashes; }

# A pinned uv in its own small environment; `pip --target` where the system's Python came without venv.
fetch_uv() {
    say "uv is missing: fetching the pinned one into .tools/uv (25 MB)"
    for candidate in "$@" python3 /usr/bin/python3 python "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.*/bin/python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 || continue
        rm -rf .tools/uv
        if "$candidate" -m venv .tools/uv >/dev/null 2>&1; then
            .tools/uv/bin/python -m pip install --quiet --require-hashes -r requirements/uv.txt >&2 || continue
        else
            rm -rf .tools/uv
            "$candidate" -m pip --version >/dev/null 2>&1 || continue
            "$candidate" -m pip install --quiet --target .tools/uv --require-hashes -r requirements/uv.txt >&2 || continue
        fi
        usable_uv .tools/uv/bin/uv && return 0
    done
    stop "no Python here could fetch uv: install uv (https://docs.astral.sh/uv) or python3-venv, then repeat the command"
}

find_uv() {
    if command -v uv >/dev/null 2>&1 && usable_uv uv; then command -v uv
    elif usable_uv .tools/uv/bin/uv; then printf '%s\n' "$root/.tools/uv/bin/uv"
    fi
}

# uv does not read pip's settings; a machine that reaches packages only through them must still work.
follow_pip_settings() {
    if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        index=${PIP_INDEX_URL:-$(python3 -m pip config get global.index-url 2>/dev/null || true)}
        [ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
    fi
    if [ -z "${SSL_CERT_FILE:-}" ] && [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
}

# Gives $uv: a usable one, fetched if there is none, which follows the machine's settings and no active environment.
prepare_uv() {
    unset VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH 2>/dev/null || true
    export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}"
    export UV_PYTHON_DOWNLOADS="${UV_PYTHON_DOWNLOADS:-manual}"
    follow_pip_settings

    uv=$(find_uv)
    if [ -z "$uv" ]; then fetch_uv; uv=$root/.tools/uv/bin/uv; fi
}
