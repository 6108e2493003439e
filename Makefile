# make demo: the T5 recipe on its offline sample.
# make soak: runs of every method are killed for SOAK_SECONDS, and compared with undisturbed ones (docs/reliability.md).
# make test: lint, format and the fast tests.   make test-slow: the slow ones.   make test-all: both.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread a process: the tests run side by side, on as many processes as there are cores.
PYTEST := $(BIN)/pytest --numprocesses auto --durations 10
SLOW_BUDGET ?= 25m
SOAK_SECONDS ?= 1800
SOAK_SEED ?= 0

.PHONY: demo test test-slow test-all lint soak clean

$(STAMP): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/accelerate launch --num_processes 1 recipes/t5_wmt16.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m fast

test-slow: $(STAMP)
	timeout --foreground $(SLOW_BUDGET) $(PYTEST) -m slow

test-all: test test-slow

soak: $(STAMP)
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m soak.campaign --seconds $(SOAK_SECONDS) --seed $(SOAK_SEED)

clean:
	rm -rf $(VENV) out
