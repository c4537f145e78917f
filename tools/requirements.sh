#!/bin/sh
# Pins again what pyproject.toml asks for. No index address may enter these files: they hold for every mirror.
set -eu
cd "$(dirname "$0")/.."
uv=$(command -v uv || printf '%s' .tools/uv/bin/uv)

"$uv" pip compile pyproject.toml --group dev --python .venv/bin/python \
    --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet --output-file requirements/dev.txt
grep -n -i -e '^ *--\(extra-\)\{0,1\}index-url' -e '^ *--find-links' requirements/dev.txt && exit 1
printf 'pinned %s packages in requirements/dev.txt\n' "$(grep -c '==' requirements/dev.txt)"
