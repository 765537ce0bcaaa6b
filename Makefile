# `make demo` and `make test` need only python3 with pip and a network; everything lands in .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
ARGS ?=

PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: venv demo test lint clean

venv: .venv/.installed

.venv/.installed: pyproject.toml setup.cfg
	@$(PYTHON) -c "import sys; sys.version_info < (3, 10) and sys.exit('python 3.10 or newer is needed; name one with make PYTHON=...')"
	@echo "[1/3] creating .venv"
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip .venv && \
		$(PYTHON) -m pip --python .venv/bin/python install --quiet pip; }
	@echo "[2/3] installing $(TORCH); this can take minutes"
	@$(PIP) "$(TORCH)"
	@echo "[3/3] installing dfsattn_diffusers with its test tools"
	@$(PIP) --editable ".[test]"
	@touch $@

demo: venv
	@.venv/bin/python -m dfsattn_diffusers.cli.demo $(ARGS)

lint: venv
	.venv/bin/ruff check .
	.venv/bin/python scripts/update_docs.py --check

test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(JOBS) -m "not gpu" $(ARGS)

clean:
	rm -rf .venv outputs build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
