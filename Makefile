# The same commands that CI runs. VENV is made anew if it does not exist.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test units slow arm64 lint style types

demo: $(BIN)/autolite
	$(BIN)/autolite search --target pixel8

# Types are checked beside the tests: that takes a minute of one core, and some of the tests wait for each other.
test: $(VENV)/.dev style
	$(MAKE) --jobs 2 types units

# A process for each core; a file's tests stay together, and so does what they share. Files come in their own order, which
# has the long ones of tests/search before many short ones, so that both processes end together. Bytecode is kept as
# modules are imported, whatever the environment says: to compile all that is installed takes a minute.
units: export PYTHONDONTWRITEBYTECODE :=
units: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# The artifacts on emulated Arm processors; what that needs is downloaded to .arm64, once.
arm64: $(VENV)/.dev
	tests/arm64/prepare.sh .arm64 $(BIN)/python
	$(BIN)/python -m pytest -m arm64 tests/arm64

lint: style types

style: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

$(BIN)/autolite:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt .

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@
