# make demo    creates .venv, runs the quickstart on real handwritten digits, says where the reports are
# make test    lint, type checks and the whole test suite
# make help    every target
# Choose the interpreter with PYTHON=python3.12, the environment with VENV=path.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
SOURCES := $(shell find fedcore strategies clients simulations -type f -not -name '*.pyc' 2>/dev/null)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread per process: results do not depend on the machine's cores, and workers do not fight over them.
export OMP_NUM_THREADS ?= 1
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

# torch by its exact version first, so that pip never weighs other builds of it.
$(VENV)/.requirements: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "creating $(VENV) with $(PYTHON) and installing into it: a few minutes, once"; \
		$(PYTHON) -m venv $(VENV); }
	@$(INSTALL) $$(grep '^torch==' constraints.txt)
	@$(INSTALL) .
	@touch $@

$(VENV)/.requirements-dev: $(VENV)/.requirements
	@$(INSTALL) '.[dev,ray,tensorboard]'
	@touch $@

# The package is installed as users get it, and again whenever a source file has changed.
$(VENV)/.package: $(VENV)/.requirements $(SOURCES) setup.py README.md LICENSE
	@rm -rf build
	@$(INSTALL) --no-deps --force-reinstall .
	@rm -rf build fedcore.egg-info
	@touch $@

.PHONY: install
install: $(VENV)/.package ## create .venv and install fedcore into it

.PHONY: demo
demo: $(VENV)/.package ## run the quickstart with FedAvg and with FedCompass, and say where the reports are
	@rm -rf runs/demo
	@$(BIN)/fedcore simulate examples/quickstart/experiment.yaml --set strategy=fedavg --out runs/demo/fedavg
	@echo
	@$(BIN)/fedcore simulate examples/quickstart/experiment.yaml --out runs/demo/fedcompass
	@echo
	@$(BIN)/fedcore compare runs/demo/fedavg runs/demo/fedcompass --out runs/demo/compare.html

.PHONY: lint
lint: $(VENV)/.requirements-dev ## style (ruff)
	@$(BIN)/ruff check .

# Outside the checkout, so that mypy sees the installed package and not the folder of the same name.
.PHONY: types
types: $(VENV)/.requirements-dev $(VENV)/.package ## types (mypy, on the installed package)
	@cd $(VENV) && bin/python -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p fedcore

.PHONY: test
test: lint types ## style, types and every test
	@$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

.PHONY: test-fast
test-fast: $(VENV)/.requirements-dev ## the tests that take under 5 s each
	@$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow' $(PYTEST_ARGS)

.PHONY: faults
faults: $(VENV)/.requirements-dev $(VENV)/.package ## 100 bad nights of a real federation, three times (about half an hour)
	@$(BIN)/python tests/faults/campaign.py --scenarios 100 --times 3

.PHONY: bench-sim
bench-sim: $(VENV)/.requirements-dev $(VENV)/.package ## time the simulator beside Flower on Ray and a bare torch loop
	@$(BIN)/python benchmarks/bench_sim.py

.PHONY: bench-compress
bench-compress: $(VENV)/.requirements-dev $(VENV)/.package ## time compressors beside torch.topk and a memory copy
	@$(BIN)/python benchmarks/bench_compress.py

.PHONY: bench-zeroth
bench-zeroth: $(VENV)/.requirements-dev $(VENV)/.package ## time FZooS's Gaussian process beside scikit-learn's
	@$(BIN)/python benchmarks/bench_zeroth.py

.PHONY: bench-link
bench-link: $(VENV)/.requirements-dev $(VENV)/.package ## time the gRPC link beside a bare grpc.aio stream
	@$(BIN)/python benchmarks/bench_link.py

.PHONY: bench-peers
bench-peers: $(VENV)/.requirements-dev $(VENV)/.package ## time virtual peers, and a real exchange beside bare TCP and gloo
	@$(BIN)/python benchmarks/bench_peers.py --full

.PHONY: clean
clean: ## remove the environment, caches and build outputs (not runs/)
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
