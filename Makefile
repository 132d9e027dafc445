# What a person runs is what CI runs.

PYTHON ?= python
CODE = $(wildcard framework plugins server tests scripts benchmarks examples)
TYPED = $(wildcard framework plugins server)

.PHONY: check lint types test sizes fix

check: lint types test

lint:
	$(PYTHON) -m ruff format --check $(CODE)
	$(PYTHON) -m ruff check $(CODE)
	$(PYTHON) scripts/reference.py --check

types:
	$(PYTHON) -m mypy $(TYPED)

test:
	$(PYTHON) -m pytest

sizes:
	$(PYTHON) scripts/sizes.py

fix:
	$(PYTHON) -m ruff check --fix $(CODE)
	$(PYTHON) -m ruff format $(CODE)
	$(PYTHON) scripts/reference.py
