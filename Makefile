# All commands use .venv, which `make setup` creates, and updates when the pinned versions change.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Test files run in parallel, each with one core and about 2 GB.
PYTEST := $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
STAMP  := $(VENV)/.installed

.PHONY: setup proto docs lint test test-fast test-host test-gpu test-slow bench mutants soak demo lock sbom attack clean

setup: $(STAMP)  ## install everything into .venv (about 3 minutes and 8 GB: LMDeploy brings CUDA builds)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about 3 minutes the first time, 8 GB on disk."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

proto: $(STAMP)  ## regenerate the code of the service and of the light client from protos/
	$(BIN)/python -m protos.generate

docs: $(STAMP)  ## update the generated parts of the pages: errors and import directions
	$(BIN)/python -m docs.generate

lint: $(STAMP)  ## formatting, types, protos: the checks before the tests in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/buf lint
	$(BIN)/python -m protos.generate --check
	$(BIN)/python -m docs.generate --check

test: $(STAMP)  ## unit, property and end-to-end tests, and the comparison of stock TurboMind on the CPU
	$(PYTEST) -m "(parity or not host) and not long"

test-fast: $(STAMP)  ## the fast tests: under a minute, for every save
	$(PYTEST) -m "not slow and not gpu and not long"

test-host: $(STAMP)  ## the other tests that run the stock LMDeploy wheel: contract, HTTP and DeepStack tests
	$(PYTEST) -m "host and not parity and not long"

test-gpu: $(STAMP)  ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

test-slow: $(STAMP)  ## tests that are too long for CI: those marked long, and property tests with 20 times the examples
	$(PYTEST) -m long
	$(PYTEST) -m "hypothesis and not gpu and not host" --examples-times 20 --timeout 7200

bench: $(STAMP)  ## every benchmark, side by side with its peers; tables and plots in benchmarks/results/
	$(BIN)/python -m benchmarks

SEED ?=
SAMPLE ?= 100
ONLY ?=
mutants: $(STAMP)  ## change SAMPLE (100) places of the code and see whether a test fails: make mutants SEED=7 ONLY=service/tasks
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	$(BIN)/python -m tests.mutants --sample $(SAMPLE) $(if $(SEED),--seed $(SEED)) $(ONLY)

MINUTES ?= 30
soak: $(STAMP)  ## a mixed load for MINUTES (30); memory, descriptors, threads, tasks and slots go to benchmarks/results/
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

attack: $(STAMP)  ## every hostile case against the real server; figures go to benchmarks/results/
	$(BIN)/python -m benchmarks.attack

demo: $(STAMP)  ## server on the bundled model, one drawing analysed, one schema task run
	$(BIN)/python examples/demo.py

lock: $(STAMP)  ## renew constraints.txt, requirements.lock and requirements-extras.lock from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	@echo '# Exact versions that CI installs, for every supported Python. Renewed by `make lock`.' > constraints.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 pyproject.toml --extra dev --extra mutants \
	    --no-header --no-annotate >> constraints.txt
	@echo '# What the service needs, with hashes, for every supported Python and platform. Renewed by `make lock`.' > requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 pyproject.toml \
	    -c constraints.txt --generate-hashes --no-header --no-annotate >> requirements.lock
	@echo '# The same with the extras otel, heif, ray and batch. Renewed by `make lock`.' > requirements-extras.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 pyproject.toml --extra otel --extra heif \
	    --extra ray --extra batch \
	    -c constraints.txt --generate-hashes --no-header --no-annotate >> requirements-extras.lock

# cyclonedx-bom gets an environment of its own: what it needs would change how jsonschema checks formats here.
sbom: $(STAMP)  ## SBOM (CycloneDX) of requirements.lock, or of an environment: make sbom OF=/opt/venv/bin/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv run --quiet --no-project --with 'cyclonedx-bom>=7.5,<8' python deploy/sbom.py $(if $(OF),--python $(OF)) dist/sbom.cdx.json

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
