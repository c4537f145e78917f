#!/bin/sh
# Puts the libraries that the bench compares with into .tools/bench, beside .venv and not in it: no test and no run can
# come to depend on them. Without their own dependencies: the parts that are compared need torch and triton only.
set -eu
cd "$(dirname "$0")/../.."
requirements=requirements/bench.txt
folder=.tools/bench
stamp=$folder/setup.stamp

[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(cksum < "$requirements")" ] && exit 0
uv=$(command -v uv || printf '%s' .tools/uv/bin/uv)
# uv does not read pip's settings; a machine that reaches packages only through them must still work.
if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    index=${PIP_INDEX_URL:-$(python3 -m pip config get global.index-url 2>/dev/null || true)}
    [ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
fi
if [ -z "${SSL_CERT_FILE:-}" ] && [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
rm -rf "$folder"
"$uv" pip install --quiet --python .venv/bin/python --target "$folder" --no-deps --require-hashes -r "$requirements"
cksum < "$requirements" > "$stamp"
