# Python 3.11 or newer, make and git are enough for every target but four: `deploy-check` says what else it needs, `compiler` and
# `peers` need a C++ compiler, `browser` Chromium. None needs root, a GPU or Docker.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# A process of tests for each processor; a file of tests stays in one of them, for what its tests share is costly.
WORKERS  ?= --numprocesses=logical --maxprocesses=8 --dist=loadfile
# Branch coverage takes time: CI measures it, and so does `make test CI=1`.
COVERAGE ?= $(if $(CI),--cov --cov-report=term:skip-covered)

.DEFAULT_GOAL := help
.PHONY: help hooks oldest demo serve test slow compiler browser ui-test check security audit format lint types quality ablations chaos batch-test ray-test fuzz compat peers deploy-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) --version`; run make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml
	@echo "Installing Giantleap, torch and what they need into $(VENV); the downloads take minutes ..."
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[cpu]"
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	@echo "Installing Giantleap, torch and the tools of its tests into $(VENV); the downloads take minutes ..."
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[cpu,dev]"
	@touch $@ $(VENV)/.run

oldest: $(BIN)/python ## Install the oldest allowed version of each direct dependency, for the targets that follow
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --resolution lowest-direct --editable ".[cpu,dev]"
	@touch $(VENV)/.run $(VENV)/.dev

hooks: $(VENV)/.dev ## Run the lint of a commit's files before each commit (pre-commit)
	$(BIN)/pre-commit install

demo: $(VENV)/.run ## Install, start the service, draw out/demo_x2.png and out/demo_x4.png, stop
	$(BIN)/python -m giantleap.cli.demo --out out

serve: $(VENV)/.run ## Install and run the service on http://127.0.0.1:8000 until Ctrl-C
	$(BIN)/giantleap serve

test: $(VENV)/.dev ## Install and run every test (starts its own Redis)
	$(BIN)/python -m pytest $(WORKERS) $(COVERAGE) -m "not slow and not gpu and not chaos and not fuzz and not deploy and not compiler and not browser and not ray"

slow: $(VENV)/.dev ## Run the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu and not chaos and not fuzz"

compiler: $(VENV)/.dev ## Run the tests of compiled code, which need a C++ compiler (minutes)
	$(BIN)/python -m pytest -m "compiler and not gpu"

browser: $(VENV)/.dev ## Run the tests of pages in Chromium, which must be on the PATH
	$(BIN)/python -m pytest -m browser

ui-test: $(VENV)/.dev ## Run those of the pages at /ui, /ui/operator and /docs only
	$(BIN)/python -m pytest -m browser tests/browser --ignore=tests/browser/test_page.py

# What is cut off by a kill is reported as not closed when it is collected; elsewhere that is an error.
CUT_OFF := -W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning

chaos: $(VENV)/.dev ## Kill workers, Redis and S3 under thousands of jobs (minutes) and store the report
	$(BIN)/python -m pytest -s -m chaos $(CUT_OFF)
	$(BIN)/python -m benchmarks.readme_figures

batch-test: $(VENV)/.dev ## Kill processes of `giantleap batch` at random and compare every output (minutes)
	$(BIN)/python -m pytest -m slow tests/batch

ray-test: $(VENV)/.dev ## Install Ray Data below .peers, kill a job on a local Ray and resume it (minutes)
	$(BIN)/python benchmarks/batch/install.py
	.peers/ray-data/bin/python -m pytest -m ray tests/batch

fuzz: $(VENV)/.dev ## Send 20,000 broken requests and many that the OpenAPI document allows (minutes)
	$(BIN)/python -m benchmarks.checks fuzz

compat: $(VENV)/.dev ## Use the openai, tritonclient and diffusers clients on a running service
	$(BIN)/python -m benchmarks.checks compat

peers: $(VENV)/.dev ## Install LitServe, BentoML and Ray Serve below .peers and measure the service beside them
	$(BIN)/python benchmarks/peers/install.py
	$(BIN)/python -m benchmarks.load --peers
	$(BIN)/python -m benchmarks.readme_figures

format: $(VENV)/.dev ## Rewrite the code in the project's format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lint: $(VENV)/.dev ## Check format and lint rules
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/codespell
	$(BIN)/python -m giantleap.service.jobqueue.scripts build/lua
	@if command -v luacheck >/dev/null; then luacheck --quiet build/lua; else \
	echo "luacheck is not installed; the Lua scripts were not checked: apt-get install lua-check"; fi

types: $(VENV)/.dev ## Check the types
	$(BIN)/mypy

security: $(VENV)/.dev ## Look for unsafe code (bandit) and vulnerable dependencies, as far as the index tells
	$(BIN)/bandit --quiet --configfile pyproject.toml --severity-level medium --recursive models export service training giantleap/batch giantleap/cli clients
	$(BIN)/python .ci/audit.py

audit: $(VENV)/.dev ## Fail where a dependency has a known vulnerability or could not be checked
	$(BIN)/python .ci/audit.py --strict

check: lint types security test ## Everything that needs only what pip installs; CI runs it and deploy-check

quality: $(VENV)/.dev ## Measure the pocket bundle (minutes) and store the table
	$(BIN)/python -m benchmarks.pocket_quality; status=$$?; $(BIN)/python -m benchmarks.readme_figures; exit $$status

ablations: $(VENV)/.dev ## Train and compare the variants of the paper's ablation tables (half an hour of one core)
	$(BIN)/python -m benchmarks.training.ablations

deploy-check: $(VENV)/.dev ## Check what needs promtool, Helm or a system Redis: images, chart, alert rules, queue
	@missing=`for tool in prometheus promtool luacheck; do command -v $$tool >/dev/null || printf ' %s' $$tool; done; \
	  command -v valkey-server >/dev/null || command -v redis-server >/dev/null || printf ' %s' 'valkey-server or redis-server'`; \
	  [ -z "$$missing" ] || { echo "Not on the PATH:$$missing. Debian and Ubuntu: apt-get install prometheus redis-server lua-check"; exit 1; }
	$(BIN)/python -m benchmarks.checks deploy

clean: ## Remove the virtual environment and everything generated
	rm -rf $(VENV) out build *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
