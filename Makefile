# `make train` and `make test` set up all they need in .venv. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.lock)

# Two processes of one thread each: most tests interpret kernels, which no second thread speeds up.
SPREAD := -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install train test test-all races check bench lint types format lock clean

help:  ## List the commands.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: .venv/installed  ## Create .venv with the locked versions and this project in it.

# uv installs the locked files in parallel; it is itself the first thing that the lock file pins. Bytecode is compiled
# once, since a test's child process that has to compile what it imports of torch takes several times as long.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11: name a newer one, as in 'make PYTHON=python3.12 $(MAKECMDGOALS)'"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --no-index -e .
	@touch $@

train: install  ## Train B0 on the generated sample (minutes on two cores), print what it learnt, and hold it to that.
	@out=runs/sample-$$(date +%Y%m%d-%H%M%S); $(BIN)/python -m fastnet.train --recipe quick --out $$out \
		&& $(BIN)/python -m fastnet.evaluate $$out --no-report --expect-reported

test: install  ## The tests that continuous integration runs.
	$(BIN)/python -m pytest tests -m "not full" $(SPREAD)

test-all: install  ## Every test, the full products of shapes and dtypes too.
	$(BIN)/python -m pytest tests $(SPREAD)

# ttsem executes the compiled kernels on a CPU. Its environment is .venv, seen through a path file, and ttsem: what is
# checked is compiled by the torch and triton that are locked, and nothing large is installed twice. ttsem asks for
# Python 3.12 without using it, hence --ignore-requires-python; the planted faults show that it works on this one.
races: .venv-races/installed  ## Races, overruns and unwritten memory in the compiled kernels, without a GPU.
	.venv-races/bin/python -m pytest -p tests.races tests/kernels/test_races.py $(SPREAD)

.venv-races/installed: requirements-races.lock .venv/installed
	$(BIN)/python -m venv --clear --without-pip .venv-races
	$(BIN)/python -m pip --python .venv-races/bin/python install --quiet --disable-pip-version-check --no-deps \
		--ignore-requires-python --require-hashes -r requirements-races.lock
	@path() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(path .venv)')" > "$$(path .venv-races)/locked.pth"
	@touch $@

check: install lint types  ## Daily: lint, types and the quick tests (under two minutes).
	$(BIN)/python -m pytest tests -m "not slow and not wide and not full" -q $(SPREAD)

bench: install  ## Benchmarks against timm and torchvision on this machine.
	$(BIN)/python -m pytest bench --benchmark-only

lint: install  ## ruff and the direction of imports, without changing anything.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

reference: install  ## The API's reference as web pages, from the docstrings, in docs/reference.
	$(BIN)/python docs/make_reference.py

types: install  ## mypy.
	$(BIN)/mypy

format: install  ## Let ruff put the files in order.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: install  ## Re-resolve requirements*.lock (names, versions and hashes; no address).
	$(BIN)/uv pip compile pyproject.toml --group dev --extra onnx --extra lite --extra hf --extra openvino --extra suspects \
		--universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --upgrade -o requirements.lock
	$(BIN)/uv pip compile --group races --no-deps --universal --python-version 3.12 --no-build --no-python-downloads \
		--generate-hashes --no-emit-index-url --no-header --upgrade -o requirements-races.lock

clean:  ## Remove the environment and caches.
	rm -rf .venv .venv-races .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
