# Everything runs in .venv, which scripts/setup.py makes once (any Python 3.8 or later starts it).
PYTHON ?= python3
# Where `make quickstart` puts its run; the command itself defaults to ~/rondo.
RONDO_STORAGE ?= $(CURDIR)/storage
export RONDO_STORAGE
# Images for Python often set it. Without the files that it forbids every role compiles 4,500 modules: 11 s of a core.
unexport PYTHONDONTWRITEBYTECODE

RUN = .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help env env-cpu env-gpu quickstart test test-all check format bench bench-gpu profile reproduce chaos lock clean

help:
	@echo "make quickstart   three rounds of iterated RLHF on this machine, and a report to look at"
	@echo "make test         the tests, two files at a time, the slow ones left out"
	@echo "make test-all     all tests"
	@echo "make check        lint, format, types, layers"
	@echo "make format       put the code into its format"
	@echo "make bench        how long our ways take beside what one would do instead (docs/benchmarks.md); BENCH=\"--only C1 C4\" takes some"
	@echo "make bench-gpu    the same on one NVIDIA GPU: MFU, memory, how far from its limits; BENCH=\"--budget 500\" takes what fits into 500 s"
	@echo "make profile      a flame graph of a run's start and second round, by py-spy (docs/benchmarks.md)"
	@echo "make reproduce    the papers' tables made again in the small (hours; goes on where it stopped)"
	@echo "make chaos        every fault of docs/promises.md done to real runs (one to two hours on two cores)"
	@echo "make env          the environment (the other verbs make it when it is missing)"
	@echo "make env-gpu      the environment for a machine with NVIDIA GPUs"
	@echo "make env-cpu      back to the one without"
	@echo "make lock         compile the lock files again from pyproject.toml"
	@echo "make clean        delete the environment and the caches; runs stay"

# Keeps whichever of the two is installed.
env:
	@$(PYTHON) scripts/setup.py

env-cpu:
	@$(PYTHON) scripts/setup.py cpu

env-gpu:
	@$(PYTHON) scripts/setup.py gpu

quickstart: env
	@$(RUN) -m cluster run configs/quickstart.yaml

test: env
	$(RUN) -m pytest -n 2 -m "not slow" --durations=25

test-all: env
	$(RUN) -m pytest -n 2 --durations=25

check: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/lint-imports --no-logo

format: env
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: env
	$(RUN) -m benchmarks $(BENCH)

bench-gpu: env
	$(RUN) -m benchmarks.gpu $(BENCH)

# PROFILE takes options of the run.
profile: env
	$(RUN) -m benchmarks.flames $(PROFILE)

reproduce: env
	$(RUN) -m benchmarks.reproduce

chaos: env
	$(RUN) -m benchmarks.faults

lock: env
	scripts/lock.sh

clean:
	rm -rf .venv .bootstrap .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
