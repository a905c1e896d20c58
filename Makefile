# make demo    set up, then train on GeoHop and print held-out exact match before and after; CONTINUE=yes goes on with the last one
# make demo ENGINE=sglang  the same, sampled with SGLang
# make test    set up, then run all tests, three at once on two cores, since many wait; ARGS="tests/cli -k name" for some, JOBS=0 one by one
# make check   the quick half before a commit: lint, and the tests that start no process and open no connection
# make coverage  all tests again, and how much of the product they run through (statements and branches)
# make setup   the virtual environment in .venv (demo, test and lint call it by themselves)
# make lint    style, types, import contracts, contract and stubs
# make format  put the code into the style that lint asks for
# make bench   the benchmarks: rollout, training on trees
# make sglang-cpu   SGLang in an environment of its own, .venv-sglang, for a machine without a GPU (2 GB)
# make test-sglang  set it up, then run the tests on real SGLang servers, of both versions (minutes)
# make fuzz    100,000 mutated messages to everything that takes a stranger's bytes (a quarter of an hour)
# make chaos   kill, stop and cut off every part of a run, sixty times, and audit what it wrote down (half an hour)
# make test-compose  build and run docker-compose.yml on the Docker engine that answers: scale, kill, resume (minutes)
# make lock    write deploy/requirements-*.lock again: what the images install, with hashes (needs uv)
# make image-digests   lines for .env that name the images of others by digest (needs docker and the registries)
# make protos  generate the stubs in treegrpo/v1 again

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test check pure contracts coverage test-compose lint style types format lock image-digests protos bench chaos fuzz sglang-cpu test-sglang

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
READY := .venv/.ready
RUN_DIR ?= runs/demo
ARGS ?=
CONTINUE ?=
JOBS ?= $(shell echo $$(( $$(nproc 2> /dev/null || echo 2) * 3 / 2 )))
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses $(JOBS) --maxprocesses 8 --dist loadgroup --no-loadscope-reorder
ENGINE ?= embedded
SGLANG := .venv-sglang
SGLANG_READY := $(SGLANG)/.ready
SGLANG_NEXT := .venv-sglang-0.5.23
SGLANG_NEXT_READY := $(SGLANG_NEXT)/.ready
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is not Python 3.11 or later; install it, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up .venv; the first time takes a few minutes."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv || { \
		echo "error: $(PYTHON) cannot make virtual environments; install its venv package (python3.11-venv on Debian)" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# A run goes on in its directory: the last demo moves aside, unless it is to go on.
demo: $(READY) $(if $(filter sglang,$(ENGINE)),$(SGLANG_READY))
	@if [ -e "$(RUN_DIR)" ] && [ -z "$(CONTINUE)" ]; then \
		kept="$(RUN_DIR)-until-$$(date +%Y%m%d-%H%M%S)"; mv "$(RUN_DIR)" "$$kept"; echo "The last run is kept in $$kept."; fi
	@$(BIN)/treegrpo up examples/geohop/geohop.toml --run.dir "$(RUN_DIR)" --engine.kind "$(ENGINE)" $(ARGS)

test: $(READY)
	@OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL) $(ARGS)

check: $(READY)
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target types style contracts pure

pure: $(READY)
	OMP_NUM_THREADS=1 $(PYTEST) -m pure $(ARGS)

contracts: $(READY)
	$(PYTEST) tests/contract

coverage: $(READY)
	@$(BIN)/python -m coverage erase
	@OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest $(PARALLEL) --timeout 300 $(ARGS)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report

test-compose: $(READY)
	@TEST_COMPOSE=1 OMP_NUM_THREADS=1 $(PYTEST) tests/compose -x -rs $(ARGS)

lint: style types contracts

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint protos

types: $(READY)
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

bench: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.rollout
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.packing

sglang-cpu: $(SGLANG_READY)

# SGLang pins its own torch and transformers. What it asks for beyond these files is CUDA, hence --no-deps; the shims stand in for it.
$(SGLANG_READY): $(addprefix deploy/sglang/requirements-,torch.txt cpu-nodeps.txt cpu.txt)
	@echo "Setting up $(SGLANG); it takes a few minutes and 2 GB."
	@test -x $(SGLANG)/bin/python || "$(PYTHON)" -m venv $(SGLANG)
	@$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check -r deploy/sglang/requirements-torch.txt
	@$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r deploy/sglang/requirements-cpu-nodeps.txt
	@$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check -r deploy/sglang/requirements-cpu.txt
	@echo "$(CURDIR)/deploy/sglang/shims" > "$$($(SGLANG)/bin/python $(SITE))/treegrpo-shims.pth"
	@SGLANG_USE_CPU_ENGINE=1 $(SGLANG)/bin/python -c 'import sglang.launch_server'
	@touch $@

# The newer version lies on top of that environment: it finds there what it does not have itself.
$(SGLANG_NEXT_READY): $(SGLANG_READY) deploy/sglang/requirements-0.5.23.txt
	@test -x $(SGLANG_NEXT)/bin/python || $(SGLANG)/bin/python -m venv --without-pip $(SGLANG_NEXT)
	@$(SGLANG)/bin/python -m pip --python $(SGLANG_NEXT)/bin/python install --quiet --disable-pip-version-check --no-deps \
		-r deploy/sglang/requirements-0.5.23.txt
	@printf '%s\n' "$$($(SGLANG)/bin/python $(SITE))" "$(CURDIR)/deploy/sglang/shims" \
		> "$$($(SGLANG_NEXT)/bin/python $(SITE))/treegrpo-base.pth"
	@SGLANG_USE_CPU_ENGINE=1 $(SGLANG_NEXT)/bin/python -c 'import sglang.launch_server'
	@touch $@

test-sglang: $(READY) $(SGLANG_READY) $(SGLANG_NEXT_READY)
	@SGLANG_PYTHON=$(SGLANG)/bin/python OMP_NUM_THREADS=1 $(PYTEST) tests/sglang --timeout 600 $(ARGS)
	@SGLANG_PYTHON=$(SGLANG_NEXT)/bin/python OMP_NUM_THREADS=1 $(PYTEST) \
		tests/sglang/test_conformance.py tests/sglang/test_commands.py tests/sglang/test_bad_input.py --timeout 600

fuzz: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(ARGS)

chaos: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(ARGS)

lock: $(READY)
	@$(BIN)/python deploy/lock.py

image-digests:
	@"$(PYTHON)" deploy/image_digests.py

protos: $(READY)
	cd protos && ../$(BIN)/python -m grpc_tools.protoc -I . --python_out=.. --pyi_out=.. --grpc_python_out=.. treegrpo/v1/*.proto
