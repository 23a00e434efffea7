# `make demo`: simulate the paper's set-up on this machine. `make demo-engine`: run a small MoE on the real
# engine; `make demo-serve`: serve one by OpenAI's API. `make test`: install what the tests need and run them.
# Both create .venv; PYTHON chooses the interpreter (>= 3.11).

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The packages as they are installed, all inside qllm, for tools that read source files: in build/typed.
AS_INSTALLED = rm -rf build/typed && mkdir -p build/typed/qllm && \
	ln -s $(foreach part,$(wildcard qllm/*) scheduler sim traces executor,$(CURDIR)/$(part)) build/typed/qllm

.PHONY: demo demo-engine demo-serve test test-all soak test-lowest test-newest lint types figures docs clean

demo: .venv/.installed
	$(BIN)/qllm simulate configs/paper.yaml --out out/paper

demo-engine: .venv/.installed-executor
	$(BIN)/qllm run configs/demo_engine.yaml --out out/demo_engine

# A small random-weight MoE, made on the spot, at http://127.0.0.1:8000/v1.
demo-serve: .venv/.installed-server
	$(BIN)/qllm serve

# Files of tests side by side, and a floor for how much of scheduler and simulator they reach (pyproject.toml).
test: .venv/.installed-dev
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadscope --cov

test-all: .venv/.installed-dev
	$(BIN)/python -m pytest

# Twenty minutes of random load on the engine: every family, policy and setting, faults, closed at random moments.
soak: .venv/.installed-dev
	$(BIN)/python benchmarks/soak.py --minutes 20

# The tests of `make test` with the lowest versions that pyproject.toml allows, and with today's newest, each in an
# environment of its own; what these versions warn of is no error. Only torch keeps the version of constraints.txt in the
# second: one of its builds is several GB.
EVERYTHING := dev,docs,executor,grammar,otel,server,timings,ray,dask,notebooks

test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -m "not slow" -W default

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		$(shell grep ^torch== constraints.txt) -e '.[$(EVERYTHING)]'
	.venv-newest/bin/python -m pytest -m "not slow" -W default

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

types: .venv/.installed-dev
	$(AS_INSTALLED)
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

# Pictures and tables of README.md and docs/, from docs/results.
figures: .venv/.installed
	$(BIN)/python tools/figures.py

# The documents as web pages in build/site, with API pages from docstrings. A warning is an error.
docs: .venv/.installed-docs
	$(AS_INSTALLED)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-lowest .venv-newest out build *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python >= 3.11 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

# The project without torch: all that simulation needs.
.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e .
	touch $@

# With torch and transformers, for the engine.
.venv/.installed-executor: .venv/bin/python pyproject.toml constraints.txt executor/cpu/packed_matmul.cpp
	$(PIP) -c constraints.txt -e '.[executor]'
	touch $@ .venv/.installed

.venv/.installed-server: .venv/bin/python pyproject.toml constraints.txt executor/cpu/packed_matmul.cpp
	$(PIP) -c constraints.txt -e '.[executor,grammar,server]'
	touch $@ .venv/.installed .venv/.installed-executor

.venv/.installed-docs: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@ .venv/.installed

.venv/.installed-dev: .venv/bin/python pyproject.toml constraints.txt executor/cpu/packed_matmul.cpp
	$(PIP) -c constraints.txt -e '.[dev,executor,grammar,otel,ray,server,timings]'
	touch $@ .venv/.installed .venv/.installed-executor .venv/.installed-server

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt executor/cpu/packed_matmul.cpp
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt \
		-e '.[$(EVERYTHING)]'
	touch $@
