# Every target does its own set-up: a bare machine needs git, make, a C compiler and some Python.

python := .venv/bin/python
TESTS ?= tests
# Without --write, docs/certificates.* stay as they are.
CERTIFY ?= --write

# Tests and the quickstart start several processes on few cores: one thread each is fastest.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export TOKENIZERS_PARALLELISM ?= false
export PYTHONUNBUFFERED ?= 1
# The quickstart and the default tests are for the CPU, on machines with a GPU too.
export MEGATRON_DISTILL_DEVICE ?= cpu
# Nothing here needs the Hugging Face hub: a mistake should fail at once, not download.
export HF_HUB_OFFLINE ?= 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test slow sglang served certify bench check format requirements clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 16

setup:  ## make .venv, or do nothing when it is up to date
	@sh tools/setup.sh

quickstart: setup $(if $(filter sglang,$(ENGINE)),sglang)  ## distil a tiny model on two processes, about 5 minutes; ENGINE=sglang: with two servers
	@$(python) -m tools.quickstart.run $(if $(ENGINE),--engine $(ENGINE))

check: setup  ## lint, formatting, types
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy

test: check  ## check, then the tests; TESTS="tests/unit/losses -k kl" chooses
	@$(python) -m pytest -m "not slow and not gpu and not sglang" $(TESTS)

slow: setup  ## the tests that take minutes; TESTS chooses here too
	@$(python) -m pytest -m "slow and not gpu and not sglang" $(TESTS)

sglang: setup  ## make .venv-sglang, which runs SGLang's real server, on CPUs too; once
	@sh tools/setup_sglang.sh

served: setup sglang  ## the tests with the real SGLang server; TESTS chooses here too
	@$(python) -m pytest -m "sglang and not gpu" $(TESTS)

certify: setup  ## hold every objective to its oracle under every cut; writes docs/certificates.*
	@$(python) -m tests.certify.run $(CERTIFY)

bench: setup  ## losses against others' (half an hour; BENCH_SET=quick: minutes), then training steps by phase
	@sh tools/bench/setup.sh
	@$(python) -m tools.bench.losses --set $(or $(BENCH_SET),full)
	@$(python) -m tools.bench.step

format: setup  ## let ruff rewrite what it can
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .

requirements: setup  ## pin again from pyproject.toml, with hashes and without index addresses
	@sh tools/requirements.sh

clean:  ## remove runs, caches and the environments
	rm -rf .venv .venv-sglang .tools .mypy_cache .ruff_cache .pytest_cache runs build dist
