# Everything sets itself up: `make demo` and `make test` on a fresh machine need only python3 and make.
.DEFAULT_GOAL := help
.PHONY: help setup demo stack stack-down test simulate mutants faults acceptance full fuzz lint format types oracles bench bench-peers chart docs installed image lock clean
# The newest that is here of those that are supported. PYTHON names another one: the environment is made anew for it.
PYTHON ?= $(or $(shell for python in python3.13 python3.12 python3.11; do $$python -c "import ensurepip, venv" 2> /dev/null && echo $$python && break; done),python3)
# Tests and faults start a thousand processes: each would compile the gateway anew.
export PYTHONDONTWRITEBYTECODE :=
LOG ?= embedded
BIN := .venv/bin
CHART := deploy/kubernetes/webhook-gateway
READY := .venv/ready
version_of = $(shell $(1) -c 'import sys; print(sys.version)' 2> /dev/null)
ifneq ($(origin PYTHON),file)
ifneq ($(call version_of,$(BIN)/python),$(call version_of,$(PYTHON)))
.PHONY: $(READY)
endif
endif

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(READY): requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("gateway needs Python 3.11 or newer, got " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

setup: $(READY) ## make .venv with a working .venv/bin/gateway

demo: $(READY) ## signed events in, delivered, retried, dead-lettered, replayed (LOG=kafka: on a real broker)
	@$(BIN)/python dev/demo.py --log $(LOG)

stack: $(READY) ## Kafka, an ingress, a router, Prometheus, Alertmanager, and traffic; prints where to look
	@$(BIN)/python dev/stack.py

stack-down: ## end what `make stack` has started; nothing of it is left
	@$(BIN)/python dev/stack.py --down

# What compares times. Pytest collects in these files alone: in all of them, that takes as long as to run these tests.
ALONE = $(shell grep -rl --include='test_*.py' 'pytest\.mark\.alone' tests)

test: $(READY) ## format, lint, types, tests
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	-@$(BIN)/python dev/tools.py actionlint alertmanager amtool axe chromium haproxy helm prometheus promtool systemd-analyze zsh > /dev/null
	$(BIN)/python -m pytest -q --collect-only > /dev/null & $(BIN)/mypy; types=$$?; wait; exit $$types  # compiled here, not by each worker
	$(BIN)/python -m pytest -q -m alone $(ALONE)  # with nothing else on the machine
	$(BIN)/python -m pytest -q -m "not alone" -n 3 --dist loadfile --no-loadscope-reorder  # on two cores, too: half the time they wait

faults: $(READY) ## real faults under load, each with its ledger (some 30 minutes)
	-@$(BIN)/python dev/tools.py alertmanager prometheus promtool
	$(BIN)/python -m pytest tests/faults -q --full

acceptance: $(READY) ## whole processes at full size, on both logs (some two hours)
	$(BIN)/python -m pytest tests/acceptance -q -s --full

# Beside those, and but for what compares times, which a shared machine disturbs, and the image (`make image`).
FULL = tests/index/test_search.py tests/ingress/test_certificate_headers.py tests/ingress/test_proxy_protocol.py \
	tests/log/test_kafka_acls.py tests/rules/test_route_table.py tests/spool/test_simulation.py
full: $(READY) ## what else has more cases or needs more than `make test`: real proxies, ACLs of a broker (half an hour)
	-@$(BIN)/python dev/tools.py haproxy nginx > /dev/null
	$(BIN)/python -m pytest -q --full $(FULL)

GATEWAY_FUZZ_SECONDS ?= 600
fuzz: $(READY) ## inputs that nearly fit, for ten minutes of each reader of what strangers send; FUZZ="-k xml" one of them
	GATEWAY_FUZZ_SECONDS=$(GATEWAY_FUZZ_SECONDS) $(BIN)/python -m pytest tests/fuzz -q -s -n 2 $(FUZZ)

lint: $(READY) ## format check, lint and types, without the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## write the format and the safe fixes
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

SEEDS ?= 10000
FIRST ?= 0
simulate: $(READY) ## the engine in SEEDS=10000 simulation runs from FIRST=0 on; makes the first failure small
	@$(BIN)/python -m tests.simulation --first $(FIRST) --seeds $(SEEDS)

mutants: $(READY) ## bugs that a tired engineer could write: each has to be noticed (an hour)
	@$(BIN)/python -m tests.mutants

oracles: $(READY) ## the vendors' own libraries against ours, on requests drawn anew (installs some 50 of them)
	$(PYTHON) -m venv .oracles && .oracles/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/oracles.txt
	GATEWAY_ORACLES=1 GATEWAY_MUTATIONS=10000 PYTHONPATH=.:$$(echo .oracles/lib/python*/site-packages) $(BIN)/python -m pytest -q --timeout 600 tests/oracles tests/verify/test_vectors.py

bench: $(READY) ## cost relative to a minimal aiohttp pipeline, measured in one run
	@$(BIN)/python -m benchmarks

bench-peers: $(READY) ## the same path by other programs, side by side (needs Go; the first time it builds them)
	@$(BIN)/python -m benchmarks.peers

chart: ## copy the Prometheus rules and the dashboards into the Helm chart
	rm -rf $(CHART)/files && mkdir -p $(CHART)/files
	cp -R deploy/prometheus/rules deploy/grafana/dashboards $(CHART)/files/

docs: $(READY) ## these documents as a site, in .site/
	$(BIN)/sphinx-build -q -E -W --keep-going -c docs . .site
	@echo .site/index.html

installed: $(READY) ## what is installed: the wheel in an empty environment, dashboards and alerts in a Prometheus
	-@$(BIN)/python dev/tools.py alertmanager amtool chdb prometheus promtool
	$(BIN)/python -m pytest -q --full tests/deploy/test_wheel.py tests/deploy/test_dashboards.py tests/deploy/test_prometheus.py tests/deploy/test_clickhouse.py

image: $(READY) ## build the image on a Debian of its own, and try it
	@$(BIN)/python dev/tools.py buildah debootstrap
	$(BIN)/python -m pytest tests/deploy/test_image.py -q -s --full

lock: ## pin the newest versions that pyproject.toml allows, with hashes (needs uv)
	uv pip compile pyproject.toml --extra otel --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -q --upgrade -o requirements/run.txt
	uv pip compile deploy/image/build.in --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -q --upgrade -o requirements/build.txt
	uv pip compile pyproject.toml --extra otel --group dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -q --upgrade -o requirements/dev.txt -c requirements/run.txt
	uv pip compile requirements/oracles.in --universal --no-strip-extras --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -q --upgrade -o requirements/oracles.txt -c requirements/dev.txt

clean: ## remove what the other targets made
	rm -rf .venv .kafka .tools .oracles .site .stack .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
