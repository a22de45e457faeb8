# make demo · make test · make docs · make bench · make bench-gpu · make clean
#
# The first call makes .venv and installs the requirements; later calls find them there.
# Another recipe: make demo CONFIG=configs/frugal.py. Another interpreter: make demo PYTHON=python3.12.
# Another place for the environment: make demo VENV=~/micro_dit_env.
# Figures to a file: make bench ARGS=--json=figures.json.

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

# Runs, shards and the compilation cache stay: they are dear.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache docs/_build micro_dit.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The file pip is made last, so that an environment that was left half made is made again.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("error: Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/pip
	@echo "Installing the requirements into $(VENV) (some minutes, once)"
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@
