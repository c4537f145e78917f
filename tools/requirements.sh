#!/bin/sh
# Pins again what pyproject.toml asks for. No index address may enter these files: they hold for every mirror.
set -eu
cd "$(dirname "$0")/.."
uv=$(command -v uv || printf '%s' .tools/uv/bin/uv)

pin() {
    file=$1
    shift
    "$uv" pip compile "$@" --python .venv/bin/python \
        --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet --output-file "$file"
    if grep -n -i -e '^ *--\(extra-\)\{0,1\}index-url' -e '^ *--find-links' "$file"; then exit 1; fi
    printf 'pinned %s packages in %s\n' "$(grep -c '==' "$file")" "$file"
}

pin requirements/dev.txt pyproject.toml --group dev
server=tools/sglang_cpu/pyproject.toml
pin requirements/sglang.txt "$server" --group "$server:build"
