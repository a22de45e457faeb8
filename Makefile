# make demo · make test · make docs · make bench · make bench-gpu · make clean
#
# The first call creates .venv and installs the requirements.
# Other recipe: make demo CONFIG=configs/frugal.py. Other interpreter: make demo PYTHON=python3.12.
# Other environment folder: make demo VENV=~/micro_dit_env.
# Benchmark results as JSON: make bench ARGS=--json=results.json.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/mask75.py
RUN = $(VENV)/bin/python

.PHONY: demo test docs bench bench-gpu clean

demo: $(VENV)/.installed
	$(RUN) -m micro_dit.main --config=$(CONFIG)

test: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: $(VENV)/.installed-dev
	$(RUN) -m sphinx -W --keep-going -q docs docs/_build
	@echo "The site is in docs/_build/index.html"

bench: $(VENV)/.installed
	$(RUN) -m benchmarks.train_step $(ARGS)

bench-gpu: $(VENV)/.installed
	$(RUN) -m benchmarks.gpu $(ARGS)

# Keeps runs, shards and the compilation cache, because they are expensive to recompute.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache docs/_build micro_dit.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# venv writes pip last, so an incomplete environment is created again.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("error: $(PYTHON) is Python %d.%d, but 3.11, 3.12 or 3.13 is required. Run make PYTHON=python3.12." % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/pip
	@echo "Installing the requirements into $(VENV) (once, takes several minutes)"
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@
