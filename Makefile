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
PARTITION ?= dirichlet
EXPERIMENT ?= icd10
AGGREGATION ?=
HOSTS ?=
RUN ?=
OUT ?=
PROMPT ?=
DEVICES ?=
WORKERS ?=
RUNS ?=
EXPERIMENTS ?=
# An experiment of a comparison has its own rounds, unless somebody gave others.
compared_rounds = $(if $(filter command environment,$(firstword $(origin ROUNDS))),$(ROUNDS))
CONNECT ?=
DATA ?=
FORCE ?=
JSON ?=
TRUST ?=
REQ ?=
REPLY ?=
FINGERPRINT ?=
RENEW ?=
ACCEPTED ?=
connect = $(if $(CONNECT),--connect $(CONNECT))
as_json = $(if $(filter-out 0,$(JSON)),--json)
# SITES counts the sites that are made; a rotation takes their names, and all unless somebody named some.
own_sites = $(if $(filter command environment,$(firstword $(origin SITES))),$(SITES))
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
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[engine,demo,he,kit,simulation,benchmark,dev]'
	@touch $@

.PHONY: install
install: $(VENV)/.installed ## make .venv with the pinned packages

## use

.PHONY: demo
demo: install ## three hospitals fine-tune one 4-bit model over TLS (SITES=3 ROUNDS=4 PARTITION=iid BASELINES=1 AGGREGATION=... SET="training.steps=5")
	@exec $(BIN)/python -m demo run --experiment $(EXPERIMENT) --sites $(SITES) --rounds $(ROUNDS) --partition $(PARTITION) \
		$(if $(AGGREGATION),--aggregation $(AGGREGATION)) $(if $(BASELINES),--baselines) $(foreach one,$(SET),--set '$(one)')

.PHONY: simulate
simulate: install ## many sites on Flower's simulation engine (EXPERIMENT=tiny SITES=20 DEVICES=mixed WORKERS=2 SET="...")
	@exec $(BIN)/python -m demo simulate --experiment $(if $(filter command environment,$(firstword $(origin EXPERIMENT))),$(EXPERIMENT),tiny) \
		--sites $(or $(own_sites),20) $(if $(filter command environment,$(firstword $(origin ROUNDS))),--rounds $(ROUNDS)) \
		$(if $(DEVICES),--devices $(DEVICES)) $(if $(WORKERS),--workers $(WORKERS)) $(foreach one,$(SET),--set '$(one)')

FROM ?=
.PHONY: continue
continue: install ## a further task on a finished run (FROM=runs/... EXPERIMENT=icd10-new-wards SET="continual.penalty=0.1")
	@test -n "$(FROM)" || { echo "FROM is missing: make continue FROM=runs/... EXPERIMENT=icd10-new-wards"; exit 2; }
	@exec $(BIN)/python -m demo continue $(FROM) --experiment $(EXPERIMENT) $(if $(compared_rounds),--rounds $(compared_rounds)) \
		$(foreach one,$(own_method) $(SET),--set '$(one)')

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

HELD_OUT ?=
.PHONY: evaluate
evaluate: install ## scores at a hospital that took no part (RUN=runs/... HELD_OUT=folder, without it the demo's)
	$(needs_run)
	@$(BIN)/python -m $(if $(HELD_OUT),server evaluate $(RUN) --held-out $(HELD_OUT),demo evaluate $(RUN))

TASKS ?=
LIMIT ?=
.PHONY: benchmark-model
benchmark-model: install ## lm-evaluation-harness on the exported model (RUN=runs/... TASKS=a,b LIMIT=100, without TASKS the held-out set)
	$(needs_run)
	@held_out="$(HELD_OUT)"; $(if $(HELD_OUT)$(TASKS),,held_out=$$($(BIN)/python -m demo held-out $(RUN)) || exit $$?;) \
	$(BIN)/python -m server benchmark $(RUN) $${held_out:+--held-out "$$held_out"} $(if $(TASKS),--tasks $(TASKS)) $(if $(LIMIT),--limit $(LIMIT))

.PHONY: report
report: install ## one HTML page of a run, also while it goes on (RUN=runs/... OUT=file)
	$(needs_run)
	@$(BIN)/python -m server report $(RUN) $(if $(OUT),--out $(OUT))

.PHONY: compare
compare: install ## a table and a page of several runs (RUNS="runs/a runs/b", or EXPERIMENTS="icd10-*" runs them)
	@test -n "$(RUNS)$(EXPERIMENTS)" || { echo 'Name what to compare: make compare EXPERIMENTS="icd10-*" or RUNS="runs/a runs/b"'; exit 2; }
	@exec $(BIN)/python -m $(if $(RUNS),server compare $(RUNS) $(if $(OUT),--out $(OUT)),demo compare --experiments '$(EXPERIMENTS)' --sites $(SITES) $(if $(compared_rounds),--rounds $(compared_rounds)))

EPSILON ?= 2
.PHONY: attack
attack: install ## what an aggregator could recover of the records, unprotected and protected (EPSILON=2 OUT=file)
	@exec $(BIN)/python -m attacks --epsilon $(EPSILON) $(if $(OUT),--out $(OUT))

.PHONY: certs
certs: install ## certificate authority, SuperLink and development sites (SITES=3 HOSTS="name ...")
	@$(BIN)/python -m certs make --development --out certs/out --sites $(names) $(foreach host,$(HOSTS),--host $(host)) $(as_json)

# Where a cluster of PROJECT is up its volumes are meant, and a service that has them all does it;
# CLUSTER=0 means certs/out all the same. With CONTROL the running SuperLink of certs/out is asked too.
CLUSTER ?= $(shell docker ps -q --filter label=com.docker.compose.project=$(PROJECT) --filter label=com.docker.compose.service=superlink 2>/dev/null)
CONTROL ?=
in_volumes = $(cluster) run --rm --no-deps -T certs
in_folder = $(MAKE) --no-print-directory install 1>&2 && $(BIN)/python -m
# $(1) is the command's name in demo.lifecycle and in certs, $(2) its options.
change_keys = $(if $(filter-out 0,$(CLUSTER)),$(in_volumes) demo.lifecycle $(1) --deal /deal --connect control:9092 $(2),$(in_folder) \
	$(if $(CONTROL),demo.lifecycle $(1) --control $(CONTROL),certs $(1)) --out certs/out $(connect) $(2)) $(as_json)

.PHONY: verify-certs
verify-certs: ## check every certificate, key, roster and revocation list (CONNECT=host:port JSON=1)
	@$(if $(filter-out 0,$(CLUSTER)),$(in_volumes) certs verify --out /deal/certs --connect control:9092,$(in_folder) certs verify --out certs/out $(connect)) $(as_json)

.PHONY: rotate-certs
rotate-certs: ## new keys and certificates, also during a run (SITES=a,b for some, CONNECT=host:port)
	@$(call change_keys,rotate,$(if $(own_sites),--sites $(own_sites)))

.PHONY: rotate-ca
rotate-ca: ## the next stage of a new authority: trust, switch, retire (FORCE=1 ACCEPTED=a,b CONNECT=host:port)
	@$(call change_keys,rollover,$(if $(filter-out 0,$(FORCE)),--force) $(if $(ACCEPTED),--accepted "$(ACCEPTED)"))

.PHONY: revoke
revoke: ## a site may not come any more: list, session, SuperNode (SITE=b CONNECT=host:port CONTROL=host:port)
	@test -n "$(SITE)" || { echo "SITE is missing: make revoke SITE=b"; exit 2; }
	@$(call change_keys,revoke,--site "$(SITE)")

SUPERLINK ?=
IMAGES ?=
RELEASE ?=
.PHONY: site-kit
site-kit: ## a hospital's signed kit (SITE=a SUPERLINK=host:port IMAGES=1 for no registry, RELEASE=0.1.0-2 DEVICE=cuda)
	@test -n "$(SITE)" || { echo "SITE is missing: make site-kit SITE=a"; exit 2; }
	@$(MAKE) -s --no-print-directory install
	@$(BIN)/python -m deploy.kit --certs certs/out --site "$(SITE)" --image fedqlora-client:$(DEVICE) \
		$(if $(SUPERLINK),--superlink "$(SUPERLINK)") $(if $(filter-out 0,$(IMAGES)),--images) $(if $(RELEASE),--release "$(RELEASE)") $(as_json)

.PHONY: site-request
site-request: install ## at a site: make its keys and a request (SITE=name OUT=folder, TRUST=folder or RENEW=1)
	@test -n "$(SITE)" -a -n "$(OUT)" || { echo "SITE or OUT is missing: make $@ SITE=name TRUST=folder OUT=folder"; exit 2; }
	@$(BIN)/python -m certs request --site "$(SITE)" --out "$(OUT)" $(if $(TRUST),--trust "$(TRUST)") $(if $(filter-out 0,$(RENEW)),--renew) $(as_json)

.PHONY: sign-site
sign-site: install ## admit a site by its request (REQ=file FINGERPRINT="..." as the site reads it out)
	@test -n "$(REQ)" || { echo "REQ is missing: make $@ REQ=name.request.tar"; exit 2; }
	@$(BIN)/python -m certs sign --out certs/out --request "$(REQ)" $(if $(FINGERPRINT),--fingerprint "$(FINGERPRINT)") $(as_json)

.PHONY: site-accept
site-accept: install ## at a site: check the coordinator's reply and use it (OUT=folder REPLY=file)
	@test -n "$(REPLY)" -a -n "$(OUT)" || { echo "REPLY or OUT is missing: make $@ OUT=folder REPLY=name.reply.tar"; exit 2; }
	@$(BIN)/python -m certs accept --out "$(OUT)" --reply "$(REPLY)" $(as_json)

.PHONY: data-report
data-report: install ## counts, lengths and problems of a site's records, never their text (DATA=folder)
	@test -n "$(DATA)" || { echo "DATA is missing: make data-report DATA=folder"; exit 2; }
	@$(BIN)/python -m client data-report "$(DATA)"

## images

DEVICE ?= cpu
BASE_IMAGE ?= debian:bookworm-slim
INDEX_URL ?= $(PIP_INDEX_URL)
CA_BUNDLE ?= $(or $(PIP_CERT),$(SSL_CERT_FILE))
OFFLINE ?=
EXTRAS ?=
# A secret stays out of every layer; a build argument that the last stage does not name, out of its history.
build_image = DOCKER_BUILDKIT=1 docker build -f docker/$(1).Dockerfile --target $(2) -t fedqlora-$(2):$(DEVICE) \
	--build-arg DEVICE=$(DEVICE) --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg OFFLINE=$(OFFLINE) --build-arg EXTRAS=$(EXTRAS) \
	--build-arg PIP_INDEX_URL=$(INDEX_URL) --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) \
	--build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown) \
	$(if $(CA_BUNDLE),--secret id=ca_bundle$(comma)src=$(CA_BUNDLE)) .
comma := ,

.PHONY: images
images: ## build server, client and demo (DEVICE=cpu|cuda CA_BUNDLE=file INDEX_URL=... OFFLINE=1)
	@docker info >/dev/null 2>&1 || { echo "No container engine answers: start Docker, or add yourself to its group."; exit 2; }
	@test -z "$(CA_BUNDLE)" || test -r "$(CA_BUNDLE)" || { echo "CA_BUNDLE=$(CA_BUNDLE) cannot be read."; exit 2; }
	$(call build_image,server,server)
	$(call build_image,client,client)
	$(call build_image,server,demo)

.PHONY: wheelhouse
wheelhouse: ## wheels for images built with no package index (DEVICE=cpu|cuda)
	@PYTHON="$(PYTHON)" TORCH_INDEX_URL="$(TORCH_INDEX_URL)" EXTRAS="$(EXTRAS)" sh docker/wheelhouse.sh $(DEVICE)

## cluster

PROJECT ?= fedqlora
GPU ?=
GPUS ?=
SHARED_GPU ?=
SITE ?=
SET ?=
RESUME ?=
on_gpu = $(filter-out 0,$(GPU))$(GPUS)$(SHARED_GPU)
gpu_options = $(if $(on_gpu),$(if $(SHARED_GPU),--shared-gpu "$(SHARED_GPU)",--gpus "$(GPUS)"))
# What was last brought up: by `make up` a rendered file and its device, otherwise the root's file.
rendered := .cache/$(PROJECT)
cluster = DEVICE=$$(cat $(rendered)/device 2>/dev/null || echo $(DEVICE)) docker compose -p $(PROJECT) --project-directory . \
	-f $(or $(wildcard $(rendered)/compose.yml),docker-compose.yml)
admin = $(cluster) run --rm --no-deps -T admin
needs_cluster = @test -n "$(CLUSTER)" || { echo "No SuperLink of the cluster $(PROJECT) runs: start it with make up."; exit 2; }
# ROUNDS has a default for `make demo`; a run of the cluster takes it only where somebody gave it.
own_rounds = $(if $(filter command environment,$(firstword $(origin ROUNDS))),federation.rounds=$(ROUNDS))
own_method = $(if $(AGGREGATION),aggregation.method="$(AGGREGATION)")

.PHONY: up
up: ## aggregator and sites in containers (SITES=3, GPU=1 with GPUS=0,1,2,3 or SHARED_GPU=0, FLEET_PORT=9092)
	@$(PYTHON) -m deploy.preflight cluster --project $(PROJECT) --sites "$(SITES)" $(gpu_options)
	@mkdir -p $(rendered)
	@$(PYTHON) -m deploy.render --sites $(SITES) > $(rendered)/compose.yml
	@$(if $(on_gpu),$(PYTHON) -m deploy.render --sites $(SITES) $(gpu_options) > $(rendered)/gpu.yml)
	@echo $(if $(on_gpu),cuda,$(DEVICE)) > $(rendered)/device
	@$(MAKE) --no-print-directory images DEVICE=$(if $(on_gpu),cuda,$(DEVICE))
	@threads=$$(($$(nproc) / $(SITES))); export TRAINER_THREADS=$$((threads > 0 ? threads : 1)); \
	DEVICE=$$(cat $(rendered)/device) docker compose -p $(PROJECT) --project-directory . \
		-f $(rendered)/compose.yml $(if $(on_gpu),-f $(rendered)/gpu.yml) up -d --wait --remove-orphans || { \
		docker compose -p $(PROJECT) logs --no-log-prefix --tail 3 bootstrap; \
		echo "The cluster is not ready: make status and make logs say more."; exit 1; }

.PHONY: down
down: ## remove the cluster: containers, networks and volumes of all sites; results saved in runs/ stay
	@# A run that somebody still follows is not the compose file's, and would hold the networks.
	@docker ps -aq --filter label=com.docker.compose.project=$(PROJECT) --filter label=com.docker.compose.oneoff=True | xargs -r docker rm -f >/dev/null
	@cd / && docker compose -p $(PROJECT) down --volumes --remove-orphans
	@rm -rf $(rendered)

.PHONY: status
status: ## containers, connected sites and runs of the cluster
	@$(cluster) ps --all
	$(needs_cluster)
	@$(admin) status

.PHONY: logs
logs: ## what the cluster says (SITE=2 for one site)
	@services="$(if $(SITE),$$($(PYTHON) -m deploy.preflight logs --project $(PROJECT) --site "$(SITE)"))" || exit 2; \
	$(cluster) logs $$services

.PHONY: run
run: ## start a run in the cluster, follow it, save it in runs/ (EXPERIMENT=icd10 ROUNDS=4 AGGREGATION=... SET="key=value ..." FROM=name to continue it, or RESUME=name)
	$(needs_cluster)
	@mkdir -p runs $(rendered)
	@$(admin) $(if $(RESUME),resume $(RESUME),$(if $(FROM),continue $(FROM),run) --experiment $(EXPERIMENT) $(foreach one,$(own_rounds) $(own_method) $(SET),--set '$(one)')) \
		| tee -i $(rendered)/run.log; status=$${PIPESTATUS[0]}; \
	name=$$(sed -n 's/^run: //p' $(rendered)/run.log | tail -n 1); \
	if [ -n "$$name" ]; then $(cluster) cp serverapp:/runs/$$name runs/ && echo "saved: runs/$$name"; fi; exit $$status

## work on it

.PHONY: check
check: install ## formatting, lint, types, generated stubs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Files are dealt to workers whole: the tests of a file share their federation of processes.
# (Groups of files would save one more, but pytest-xdist 3.8.0 does not see them under pytest 9.2.)
JOBS ?= 2
in_parallel = -n $(JOBS) --dist loadfile --no-loadscope-reorder
# They sync many thousand small files: in memory, where there is room, none of them waits for a disk.
in_memory = $(shell df -k /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 4000000 {print "-p /dev/shm"}')
with_folder = folder=$$(mktemp -d $(in_memory)) && trap "rm -rf $$folder" EXIT && TMPDIR=$$folder

.PHONY: test
test: install ## everything that needs no container engine (JOBS=2)
	$(with_folder) $(BIN)/python -m pytest -q -m 'not containers and not gpu' $(in_parallel)

.PHONY: test-containers
test-containers: install images ## images, a cluster, a short run, its boundary, two failures (needs an engine)
	$(BIN)/python -m pytest -q -m 'containers and not endurance'

.PHONY: test-slow
test-slow: install images ## what takes minutes in containers: harder failures, keys that change, a hospital's kit
	$(BIN)/python -m pytest -q -m endurance

.PHONY: test-gpu
test-gpu: install ## what only a GPU shows (needs a CUDA device)
	$(BIN)/python -m pytest -q -m gpu

.PHONY: test-fast
test-fast: install ## the tests that take seconds
	$(with_folder) $(BIN)/python -m pytest -q -m 'not slow and not containers and not gpu' $(in_parallel)

.PHONY: benchmarks
benchmarks: install ## the figures of the README, as ratios
	$(BIN)/python -m benchmarks.aggregate_memory
	$(BIN)/python -m benchmarks.exact_svd
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.round_overhead
	$(BIN)/python -m benchmarks.admission
	$(BIN)/python -m benchmarks.codec
	$(BIN)/python -m benchmarks.secure_aggregation
	$(BIN)/python -m benchmarks.homomorphic

.PHONY: proto
proto: install ## generate the stubs beside fedqlora/protocol.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. fedqlora/protocol.proto

.PHONY: lock
lock: install ## write constraints.txt from what is installed
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/ @ .*//; s/+cpu$$//; s/+cu[0-9]*$$//'; } > constraints.new && mv constraints.new constraints.txt

.PHONY: clean
clean: ## remove what was generated, but neither certificates nor runs
	rm -rf $(VENV) .cache build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
