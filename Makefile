# `make quickstart` and `make test` each work first, alone, and again; both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test checks lint types imports unit chaos test-use test-cluster test-gpu bench bench-gpu install install-dev clean

quickstart: install
	$(BIN)/python -m raytrain2p.train --phase 1
	$(BIN)/python -m raytrain2p.train --phase 2
	@echo
	@echo "Before you type one of these commands: source $(BIN)/activate"

test: install-dev checks unit

checks: lint types imports

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

imports: install-dev
	$(BIN)/lint-imports

# In two processes, each with a Ray of its own: half of a launch is imports, on one core.
unit: install-dev build/quantization
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# What `make test` has in short: over 50 kills, and all that needs many launches: over an hour on 2 cores; writes docs/chaos.md.
chaos: install-dev build/quantization
	mkdir -p build
	RAYTRAIN2P_CHAOS_TABLE=$(CURDIR)/build/chaos.json $(BIN)/python -m pytest tests/chaos tests/test_docs.py tests/launch/test_resume.py tests/launch/test_job.py tests/launch/test_training.py tests/launch/test_formats.py tests/sweep/test_run.py
	RAYTRAIN2P_CHAOS_TABLE=$(CURDIR)/build/chaos.json $(BIN)/python -m pytest tests/runs/test_migrate.py
	RAYTRAIN2P_FUZZ_CASES=300 $(BIN)/python -m pytest tests/test_fuzz.py
	$(BIN)/python tests/chaos/table.py build/chaos.json docs/chaos.md

# Uses of the quickstart's model, each in minutes: RAYTRAIN2P_USE_RUN is the directory of its phase 2 run.
test-use: install-dev
	-test -x /usr/bin/chromium || apt-get install --yes chromium
	RAYTRAIN2P_USE_TESTS=1 $(BIN)/python -m pytest tests/use

# Real Ray nodes, each in namespaces of its own: jobs on them, and what happens when one is lost. Minutes; Linux alone.
test-cluster: install-dev
	RAYTRAIN2P_CLUSTER_TESTS=1 $(BIN)/python -m pytest tests/cluster

# On a machine with a CUDA GPU. Elsewhere the tests are skipped; RAYTRAIN2P_GPU_TESTS=cpu and ARGS=--tiny try both on a CPU.
test-gpu: install-dev build/quantization
	$(BIN)/python -m pytest tests/launch/test_gpu.py

# Side by side with what others use, in turns: docs/benchmarks.md. About an hour on 2 quiet cores; ARGS="step --short" tries one part.
# TRL takes part in one comparison, and is not installed into .venv.
bench: install-dev build/bench_packages
	$(BIN)/python -m benchmarks $(ARGS)

# bitsandbytes: beside .venv, since peft imports it wherever it is, for two seconds in each process. Where no registry has it, its tests say so.
build/quantization: | $(VENV)/.installed-dev
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ "$$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["quantization"])')"

build/bench_packages: $(VENV)/.installed-dev
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ trl~=1.16.0 datasets dill multiprocess xxhash

bench-gpu: install-dev build/quantization
	PYTHONPATH=build/quantization $(BIN)/python -m benchmarks.gpu build/gpu $(ARGS)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist
