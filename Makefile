# The developer's loop. `make demo` and `make test` are all that a fresh machine needs: Python 3.10+, pip, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MAKEFLAGS += --jobs=2  # the browser comes while pip works
# Two processes, each with whole files of tests: half of the time tests wait for processes that start.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup browser demo test test-fast test-gpu test-soak lint format bench docs

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## self-made videos and a real one → shards → report
	$(BIN)/python jobs/demo.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile
	$(BIN)/mypy
	$(BIN)/deptry . 2> /dev/null || $(BIN)/deptry .  # says what it scanned on stderr, every time

browser:  ## Chromium, in which the pages are tested; where it cannot be had those tests are skipped
	@command -v chromedriver > /dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium chromium-driver > /dev/null; } || \
		echo "no chromium with chromedriver: the tests in a browser are skipped"

test: $(READY) browser lint  ## what CI runs: linter, types, all tests
	$(PYTEST) -m 'not soak'

test-fast: $(READY)  ## without the tests marked slow
	$(PYTEST) -m 'not slow and not soak'

KERNEL_TESTS := $(addprefix tests/test_,gpu_kernels.py tvl1_torch.py device_codec.py flow_actor.py flow_pool.py)

test-gpu: $(READY)  ## on a machine with a GPU: what needs one, then the tests of the kernels, which are compiled there
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest -m 'not gpu and not slow' $(KERNEL_TESTS)

test-soak: $(READY) browser  ## those that take minutes each
	$(BIN)/python -m pytest -m soak

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the docs site, in out/site; stops at a dead link or a name in the API page that is gone
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	PATH=$(BIN):$$PATH $(BIN)/zensical build --strict --clean

bench: $(READY)
	for file in benchmarks/*.py; do $(BIN)/python $$file; done
