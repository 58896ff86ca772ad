# `make help` lists the targets. All that is needed beforehand is python3 (3.11 or later), make and a package registry.
PYTHON ?= python3
BIN := .venv/bin
# Where the board is: make up PORT=8081
PORT := 8080
COMPOSE := docker compose -f docker-compose.scale.yml
# The tests of what users were promised, whatever runs the scoreboard.
CONTRACT := $(addprefix tests/test_,contract_update.py contract_top.py contract_live.py edge.py)

.DEFAULT_GOAL := help
.PHONY: help up basic down test test-chaos test-deploy test-compose test-compose-chaos compose-up compose-down compose-logs lint bench \
    bench-write bench-shards bench-memory bench-layers bench-upkeep bench-size bench-gateway bench-live bench-crowd bench-basic lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

up: .venv/ready ## Start the whole cluster in the background, with the board at http://127.0.0.1:8080; or PORT=8081
	@$(BIN)/scoreboard up --detach --port $(PORT)

basic: .venv/ready ## Start the basic approach instead: one process and one PostgreSQL; or PORT=8081
	@$(BIN)/scoreboard basic --detach --home .basic --port $(PORT)

down: ## Stop both; the data stays in .scoreboard and .basic
	@test -x $(BIN)/scoreboard || { echo "There is no .venv, so nothing runs from it."; exit 1; }
	@for home in .scoreboard .basic; do [ ! -d $$home ] || $(BIN)/scoreboard down --home $$home; done

test: .venv/ready ## Run every test against real PostgreSQL, Valkey and Nginx (no Docker needed)
	@$(BIN)/pytest
	@$(BIN)/pytest --cluster=basic -m "not chaos and not nginx" $(CONTRACT)

test-chaos: .venv/ready ## Run the long tests of faults: crashes, freezes, outages, a full disk; and 200,000 updates (9 minutes)
	@$(BIN)/pytest -m "chaos and not compose" -s

test-compose: .venv/ready ## Build the containers and run the contract's tests against them
	@$(BIN)/python -m tests.compose.build
	@$(BIN)/pytest --cluster=compose -m "not chaos and not loopback" $(CONTRACT) tests/compose

# Scaling has a run of its own: other containers would take the CPU from replicas whose start is timed.
test-compose-chaos: .venv/ready ## Scale, roll out and break the containers under load
	@$(BIN)/python -m tests.compose.build
	@$(BIN)/pytest --cluster=compose -m "chaos and compose" -s tests/compose --ignore=tests/compose/test_rollout.py
	@$(BIN)/pytest --cluster=compose -m "chaos and compose" -s tests/compose/test_rollout.py

# Compose stops whatever has changed before it starts the first of the new: where replicas serve already, what is
# wrong with the settings has to be found before that.
compose-up: ## Start the containers, with the board at http://127.0.0.1:8080; or SCOREBOARD_PORT=8081
	@deploy/make-secrets
	@$(COMPOSE) build --quiet
	@test -z "$$($(COMPOSE) ps --quiet api)" || $(COMPOSE) run --rm --no-deps -T migrate
	@$(COMPOSE) up --detach --wait --wait-timeout 180 || { deploy/why; exit 1; }
	@nohup deploy/keep >> deploy/keep.log 2>&1 < /dev/null &

compose-down: ## Stop the containers; the data stays in their volumes
	@$(COMPOSE) down

compose-logs: ## Show and follow the containers' logs
	@$(COMPOSE) logs --follow --tail 100

test-deploy: .venv/deploy ## Run alerts, dashboards and manifests: promtool, a real Prometheus, kubectl (4 minutes)
	@$(BIN)/pytest -m deploy -s

lint: .venv/ready ## Style, types and module boundaries
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready ## Measure a running cluster: POST latency, and 200 to last client
	@$(BIN)/python -m tests.benchmarks.cluster

bench-write: .venv/ready ## Measure updates beside pgbench, and beside a Node.js API (YARDSTICK=folder); 4 minutes
	@YARDSTICK="$(YARDSTICK)" $(BIN)/python -m tests.benchmarks.write

bench-shards: .venv/ready ## Measure what users notice of a fault of somebody else's shard; 4 minutes
	@$(BIN)/python -m tests.benchmarks.shards

bench-memory: .venv/ready ## Measure what an API replica's memory grows to in a million updates; 6 minutes
	@$(BIN)/python -m tests.benchmarks.memory

bench-layers: .venv/ready ## Measure where the CPU of an update goes
	@$(BIN)/python -m tests.benchmarks.layers

bench-upkeep: .venv/ready ## Measure what writers notice of old operations being removed, and an audit
	@$(BIN)/python -m tests.benchmarks.upkeep

bench-size: .venv/ready ## Measure what users and updates take on disk and in memory
	@$(BIN)/python -m tests.benchmarks.size

bench-gateway: .venv/ready ## Measure a broadcast beside a bare loop, Node.js (YARDSTICK=folder) and nchan; 3 minutes
	@YARDSTICK="$(YARDSTICK)" NCHAN="$(NCHAN)" $(BIN)/python -m tests.benchmarks.gateway

bench-live: .venv/ready ## Measure POST to the last of 5,000 clients, and the age of boards in a rush; 2 minutes
	@$(BIN)/python -m tests.benchmarks.live

bench-basic: .venv/ready ## Measure the basic approach beside the cluster: updates, clients, memory; 5 minutes
	@$(BIN)/python -m tests.benchmarks.basic

bench-crowd: .venv/ready ## Measure 100,000 clients on this machine, who come and go (8 minutes, 5 GB)
	@$(BIN)/python -m tests.benchmarks.crowd

lock: .venv/ready ## Resolve the dependencies anew into deploy/requirements*.txt
	$(BIN)/uv pip compile -q -U pyproject.toml --universal --python-version 3.11 --generate-hashes \
	    --custom-compile-command "make lock" -o deploy/requirements.txt
	$(BIN)/uv pip compile -q -U pyproject.toml --extra local --group dev -c deploy/requirements.txt --universal \
	    --python-version 3.11 --generate-hashes --custom-compile-command "make lock" -o deploy/requirements-dev.txt
	$(BIN)/uv pip compile -q -U --group deploy -c deploy/requirements-dev.txt --universal \
	    --python-version 3.11 --generate-hashes --custom-compile-command "make lock" -o deploy/requirements-deploy.txt

clean: ## Remove the virtual environment and caches; .scoreboard (the data) stays
	@$(PYTHON) -c "$$STOPPED"
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# A running cluster runs from .venv: without it, what dies would not come back.
define STOPPED
import contextlib, fcntl, sys
for home in (".scoreboard", ".basic"):
    with contextlib.suppress(FileNotFoundError), open(home + "/run/lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"What runs in {home} runs from .venv, which has to be made anew: make down first.")
endef
export STOPPED

# The file is written last, so an interrupted install starts again.
.venv/ready: deploy/requirements-dev.txt pyproject.toml
	@$(PYTHON) -c "$$STOPPED"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; %s is %s. Set PYTHON=..." % (sys.executable, sys.version.split()[0]))'
	@echo "Installing into .venv (once; about half a minute)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r deploy/requirements-dev.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Debian's Prometheus is unpacked, not installed: installed, it would be started.
.venv/deploy: .venv/ready deploy/requirements-deploy.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r deploy/requirements-deploy.txt
	@{ command -v prometheus && command -v promtool; } >/dev/null || { mkdir -p .venv/prometheus && cd .venv/prometheus \
	    && apt-get download -q -o APT::Sandbox::User=root prometheus && dpkg -x prometheus_*.deb . ; } \
	    || echo "Install Prometheus with promtool: the tests that need it are skipped."
	@touch $@
