# Two commands, each complete on a fresh machine with Python 3.11 or later, pip and a C compiler:
#   make demo    see a conversation survive a killed daemon
#   make test    run every check
# Set PYTHON to choose an interpreter; `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The first of these that is Python 3.11 or later.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  "$$python" -c 'import sys, venv, ensurepip; sys.version_info < (3, 11) and sys.exit(1); print(sys.executable)' \
  2>/dev/null && break; done)

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
# Named after what decides what is installed: a change of any of it installs again, nothing else does.
SOURCES := pyproject.toml constraints.txt setup.py $(wildcard kernels/native/*)
INSTALLED := $(VENV)/.installed-$(shell cat $(SOURCES) | cksum | tr -d ' ')
PIP := $(PY) -m pip --disable-pip-version-check install -c constraints.txt
say = @printf '\033[1m==> %s\033[0m\n' $(1)

# Which part of the release column: i/n.
PART ?= 1/1

.PHONY: help demo test test-faults test-release install model lint format types proto bench-resume bench-decode bench-branches bench-fidelity bench-exact bench-end-of-turn bench-hot-bytes bench-tasks bench-kvpress bench-recall bench-speed bench-kernels clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)  ## create .venv and install what is pinned in constraints.txt

$(INSTALLED): $(SOURCES)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later with venv and pip found; install one or set PYTHON"; exit 1; }
	$(call say,"[1/4] environment $(VENV) with $(PYTHON)")
	@test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(call say,"[2/4] build tools")
	@$(PIP) --quiet setuptools wheel cffi
	$(call say,"[3/4] torch: the largest part - some minutes the first time")
	@$(PIP) --prefer-binary torch
	$(call say,"[4/4] sessiond and the rest")
	@$(PIP) --prefer-binary --no-build-isolation -e '.[server,postgres,dev]'
	@rm -f $(VENV)/.installed-* && touch $@
	$(call say,"installed")

model: $(INSTALLED)  ## fetch and convert the default model
	@$(BIN)/sessiond model fetch smollm2

demo: $(INSTALLED) model  ## a conversation survives SIGKILL; prints what resuming cost
	@$(PY) examples/demo.py

test: $(INSTALLED)  ## every check: lint, format, types, tests
	$(call say,"[1/5] lint")
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	$(call say,"[2/5] types")
	@$(PY) tests/tools/type_check.py
	$(call say,"[3/5] default model")
	@$(MAKE) model
	$(call say,"[4/5] PostgreSQL")
	@mkdir -p .cache && $(PY) tests/tools/fetch_postgres.py > .cache/postgres-bin && cat .cache/postgres-bin
	$(call say,"[5/5] tests")
	@SESSIOND_POSTGRES_BIN="$$(cat .cache/postgres-bin)" $(PY) -m pytest

test-faults: $(INSTALLED)  ## break the store and the daemon, CI column; prints one JSON line last
	@$(PY) tests/faults/main.py --column ci

test-release: $(INSTALLED)  ## the same, release column; PART=i/n runs one of n parts
	@$(PY) tests/faults/main.py --column release --part $(PART)

lint: $(INSTALLED)  ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(INSTALLED)  ## write the format that lint checks
	@$(BIN)/ruff check --fix --exit-zero --quiet . && $(BIN)/ruff format .

types: $(INSTALLED)  ## mypy --strict over the package
	@$(PY) tests/tools/type_check.py

proto: $(INSTALLED)  ## generate sessiond/v1 from proto/
	@$(PY) proto/generate.py

bench-resume: $(INSTALLED) model  ## time to first token after a restart, against computing everything
	@$(PY) benchmarks/resume.py

bench-decode: $(INSTALLED) model  ## decoding and prefill speed, against transformers
	@$(PY) benchmarks/decode.py

bench-fidelity: $(INSTALLED) model  ## how far each policy's answers are from full attention's; DATA=folder
	@$(PY) benchmarks/fidelity.py $(if $(DATA),--data $(DATA))

bench-exact: $(INSTALLED) model  ## whether sealing gives back full attention's KV after any policies
	@$(PY) benchmarks/exact_after_policy.py

bench-end-of-turn: $(INSTALLED) model  ## what sealing, indexes and writing cost the next turn
	@$(PY) benchmarks/end_of_turn.py

bench-hot-bytes: $(INSTALLED) model  ## what a hot session takes of memory under some policies
	@$(PY) benchmarks/hot_bytes.py

bench-tasks: $(INSTALLED) model  ## whether facts survive over turns, method by method; DATA=folder
	@$(PY) benchmarks/tasks.py $(if $(DATA),--data $(DATA))

bench-kvpress: $(INSTALLED) model  ## kvpress's SnapKV, KVzip and StreamingLLM, in an environment of their own; DATA=folder
	@$(PY) benchmarks/kvpress_env.py $(if $(DATA),--data $(DATA))

bench-recall: $(INSTALLED)  ## facts asked for in later turns under each policy; trains its model the first time
	@$(PY) benchmarks/recall.py

bench-speed: $(INSTALLED) model  ## speed against transformers and llama-server, through their interfaces; PLOTS=folder
	@$(PY) benchmarks/speed.py $(if $(PLOTS),--plots $(PLOTS)) $(if $(WEIGHTS),--weights $(WEIGHTS))

bench-kernels: $(INSTALLED)  ## each kernel against its reference and the memory floor
	@$(PY) benchmarks/kernels.py

bench-branches: $(INSTALLED) model  ## forks, edits and shared prefixes of long sessions; what the log costs
	@$(PY) benchmarks/branches.py

clean:  ## remove what was built here; the model cache stays
	rm -rf $(VENV) .cache .make .bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
