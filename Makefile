# make train and make test are all a new user needs; both set the environment up first (once).
#   VENV=path             where the environment lives            (default .venv)
#   PY=python3.12         which Python makes it                  (default: the first found that is 3.11 or newer)
#   TORCH_INDEX_URL=url   where torch alone is taken from, for instance the CPU wheels' index
#   ARGS="--seed 2"       what `make train` hands on to gr-train;   JOBS=2  test processes
# An empty environment has no PATH, and without one Python does not find itself.
export PATH := $(or $(PATH),/usr/local/bin:/usr/bin:/bin)
VENV ?= .venv
JOBS ?= 2
NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
PY ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN = $(VENV)/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help setup ready train test test-all lint bench bench-kernels clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

setup:  ## make or mend the environment
	@$(call setup_env,)

ready:
	@$(call setup_env,--quiet)

define setup_env
py="$(PY)"; [ -n "$$py" ] || { echo "error: no Python 3.11 or newer found; install one, or name it: make PY=/path/to/python3.11" >&2; exit 2; }; \
	"$$py" launch/setup_env.py --venv "$(VENV)" $(1)
endef

train: ready  ## train the quickstart model and write runs/quickstart/report.html
	@$(BIN)/gr-train configs/quickstart.yaml $(ARGS)

test: ready  ## the tests, without the slow ones
	$(PYTEST) $(ARGS)

test-all: ready  ## every test
	$(PYTEST) -m "" $(ARGS)

lint: ready  ## style and import rules
	$(BIN)/ruff check .

bench: ready  ## measure training on this machine
	$(BIN)/python -m benchmarks.train.run $(ARGS)

bench-kernels: ready  ## measure the operators on this machine
	$(BIN)/python -m benchmarks.kernels.run hstu_attention $(ARGS)
	$(BIN)/python -m benchmarks.kernels.run sampled_logits $(ARGS)

clean:  ## remove caches and build leftovers; runs/ and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
