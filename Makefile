PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test check format bench clean

install: .venv/installed

.venv/installed: pyproject.toml
	@echo "installing into .venv: some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: install ## pretrain and evaluate on 5,000 real digits
	$(BIN)/barlow demo

test: install ## every test, doctests included
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: install ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: install ## every benchmark, beside peer libraries; run nothing else meanwhile
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv dist build
