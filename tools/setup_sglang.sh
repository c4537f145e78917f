#!/bin/sh
# Makes .venv-sglang: the Python of .venv, SGLang with everything it pins, and the platform on which it serves on a CPU.
#
# An environment of its own, since SGLang wants older versions of what the trainer uses; the trainer talks to it over
# HTTP. uv's cache gives both the same files, so that torch is neither downloaded nor stored twice. A stamp makes the
# next call return at once until requirements, the platform, these scripts, or the folder's place change.
set -eu

cd "$(dirname "$0")/.."
root=$(pwd -P)
requirements=requirements/sglang.txt
platform=tools/sglang_cpu
environment=.venv-sglang
stamp=$environment/setup.stamp
name=sglang
. tools/setup_parts.sh

current_stamp() {
    { printf '%s\n' "$root"; cat "$requirements" "$platform/pyproject.toml" tools/setup_sglang.sh tools/setup_parts.sh
    } | cksum
}

finished() {
    [ -x "$environment/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(current_stamp)" ]
}

make_environment() {
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/^glibc //')
    case $glibc in
        '' | 2.[0-9] | 2.[12][0-9] | 2.3[0-3]) stop "glibc ${glibc:-of an unknown version}: SGLang's packages need 2.34 \
or newer (Debian 12, Ubuntu 22.04, RHEL 9)" ;;
    esac
    usable_python .venv/bin/python || stop "no usable .venv: make setup comes first"
    prepare_uv
    if ! usable_python "$environment/bin/python"; then
        rm -rf "$environment"
        "$uv" venv --quiet --python .venv/bin/python "$environment"
    fi
    rm -f "$stamp"
    say "installing SGLang's packages into $environment: some 3 GB to download beside torch, 10 GB on disk"
    "$uv" pip sync --python "$environment/bin/python" --require-hashes "$requirements"
    say "installing its platform for CPUs, editable"
    "$uv" pip install --quiet --python "$environment/bin/python" --no-deps --no-build-isolation --editable "$platform"
    # A server is three processes that import 8000 files: compiled once here, and not by each of them at its first start.
    say "looking whether a server's parts can be imported"
    (unset PYTHONDONTWRITEBYTECODE; SGLANG_PLATFORM=torch_cpu "$environment/bin/python" -W ignore -c "
import sglang.launch_server
import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.srt.managers.detokenizer_manager
from sglang.srt.models.registry import ModelRegistry
assert 'Qwen3ForCausalLM' in ModelRegistry.get_supported_archs()
") > .tools/setup_sglang.log 2>&1 || { tail -n 20 .tools/setup_sglang.log >&2; stop "they cannot: see above"; }
    current_stamp > "$stamp"
    say "done"
}

finished && exit 0
mkdir -p .tools
# Two calls at once would write into the same environment: the second waits, then finds the work done.
if [ -z "${MEGATRON_DISTILL_SGLANG_LOCKED:-}" ] && command -v flock >/dev/null 2>&1; then
    MEGATRON_DISTILL_SGLANG_LOCKED=1 exec flock .tools/setup_sglang.lock sh tools/setup_sglang.sh
fi
make_environment
