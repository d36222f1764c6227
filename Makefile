# The interpreter that makes .venv: the first of these that is new enough, or yours with `make PYTHON=...`.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && exit; done; echo python3)

# Two OpenMP threads on a busy core are slower than one: the work is spread over processes instead.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE

# A gate says nothing while it holds.
gate = @log=$$($(1) 2>&1) || { printf '%s\n' "$$log"; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help landscape test lint clean

help: ## say what there is to make
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' Makefile | awk -F': ' '{ printf "make %-10s %s\n", $$1, $$2 }'

landscape: .venv/.installed ## run the landscape suite, quick preset, into runs/landscape
	.venv/bin/recsim-gr run landscape --preset quick --out runs/landscape --workers 2

test: lint ## set up, run the gates, then the tests
	@.venv/bin/pytest

lint: .venv/.installed ## run the gates (style, types, layers)
	$(call gate,.venv/bin/ruff check .)
	$(call gate,.venv/bin/ruff format --check .)
	$(call gate,.venv/bin/mypy recsim_gr tests)
	$(call gate,.venv/bin/lint-imports --no-logo)

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf .venv build dist *.egg-info .coverage htmlcov .hypothesis
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find recsim_gr envs agents benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The build environment of the wheel is pinned too: older pips read it from PIP_CONSTRAINT, newer ones from the other.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "recsim_gr needs Python 3.11 or newer and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up .venv: a few minutes the first time."
	@$(PYTHON) -m venv .venv
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
