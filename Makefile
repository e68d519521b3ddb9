# Every target sets up its own virtual environment first (.venv, made anew when pyproject.toml changes).
# Flags go through variables:  make demo DEMO_FLAGS="--ratio 2:1 3:1 --seeds 5"    make test PYTEST_FLAGS="-k plan -x"

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

DEMO_FLAGS ?=
PYTEST_FLAGS ?=
# One worker a core and one torch thread a worker, so that workers do not compete for cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8

.PHONY: help venv demo test slow speed lint types format clean

help:
	@echo "make demo     train a timm ResNet at 1:1 and 2:1 on a few real pictures; table on screen, plot in out/demo.png"
	@echo "make test     the quick tests            make slow     both model zoos, networks of others, long tests"
	@echo "make lint     ruff and import contracts  make types    mypy"
	@echo "make format   let ruff format the code   make speed    what a conversion costs, measured"
	@echo "make venv     only set up $(VENV)        make clean    remove caches, outputs and $(VENV)"

$(STAMP): pyproject.toml
	@echo "setting up $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet torch torchvision timm
	$(PY) -m pip install --quiet -e '.[demo,test,dev]'
	touch $@

venv: $(STAMP)

demo: $(STAMP)
	$(PY) examples/demo.py $(DEMO_FLAGS)

test: $(STAMP)
	$(PYTEST) $(PYTEST_FLAGS)

slow: $(STAMP)
	$(PYTEST) -m slow $(PYTEST_FLAGS)

speed: $(STAMP)
	PYTHONPATH=tests $(PY) -m zoo.speed

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(STAMP)
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist out *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
