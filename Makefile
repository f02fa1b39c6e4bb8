# The front door: every target is one that people and CI call alike.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where pip finds torch, for a CPU build on a laptop; empty takes pip's own default.
TORCH_INDEX_URL ?=
SITES ?= 3
ROUNDS ?= 4
BASELINES ?=
EXPERIMENT ?= icd10
HOSTS ?=
RUN ?=
OUT ?=
PROMPT ?=
needs_run = @test -n "$(RUN)" || { echo "RUN is missing: make $@ RUN=runs/..."; exit 2; }
names = $(shell $(PYTHON) -c "print(','.join('abcdefghijklmnopqrstuvwxyz'[:$(SITES)]))")

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

## set-up

$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@# torch first: otherwise another package pulls a build of its own choice.
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$$(grep ^torch== constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[engine,demo,dev]'
	@touch $@

.PHONY: install
install: $(VENV)/.installed ## make .venv with the pinned packages

## use

.PHONY: demo
demo: install ## three hospitals fine-tune one 4-bit model over TLS (SITES=3 ROUNDS=4 BASELINES=1)
	@exec $(BIN)/python -m demo run --experiment $(EXPERIMENT) --sites $(SITES) --rounds $(ROUNDS) $(if $(BASELINES),--baselines)

.PHONY: resume
resume: install ## continue a run that was cut off (RUN=runs/...)
	$(needs_run)
	@exec $(BIN)/python -m demo resume $(RUN)

.PHONY: export
export: install ## merge a run's adapter into a standard checkpoint (RUN=runs/... OUT=folder)
	$(needs_run)
	@$(BIN)/python -m server export $(RUN) $(if $(OUT),--out $(OUT))

.PHONY: ask
ask: install ## base and tuned answer to one prompt (RUN=runs/... PROMPT="...")
	$(needs_run)
	@$(BIN)/python -m server ask $(RUN) "$$PROMPT"
export PROMPT

.PHONY: certs
certs: install ## certificate authority, SuperLink and development sites (SITES=3 HOSTS="name ...")
	@$(BIN)/python -m certs make --out certs/out --sites $(names) $(foreach host,$(HOSTS),--host $(host))

.PHONY: verify-certs
verify-certs: install ## check every certificate, key and the roster
	@$(BIN)/python -m certs verify --out certs/out

## work on it

.PHONY: check
check: install ## formatting, lint, types, generated stubs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: test
test: install ## everything that needs no container engine
	$(BIN)/python -m pytest -q -m 'not containers and not gpu'

.PHONY: test-fast
test-fast: install ## the tests that take seconds
	$(BIN)/python -m pytest -q -m 'not slow and not containers and not gpu'

.PHONY: benchmarks
benchmarks: install ## the figures of the README, as ratios
	$(BIN)/python -m benchmarks.aggregate_memory
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.round_overhead

.PHONY: proto
proto: install ## generate the stubs beside fedqlora/protocol.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. fedqlora/protocol.proto

.PHONY: lock
lock: install ## write constraints.txt from what is installed
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/ @ .*//; s/+cpu$$//; s/+cu[0-9]*$$//'; } > constraints.new && mv constraints.new constraints.txt

.PHONY: clean
clean: ## remove what was generated, but neither certificates nor runs
	rm -rf $(VENV) .cache build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
