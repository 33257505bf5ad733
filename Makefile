# Each target sets itself up in a project-local .venv; a stamp file per extra makes the second run quick.
#   make demo ARGS="--windows 8"    make test ARGS="tests/passes -x"    make lint    make format

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint format clean

demo: $(VENV)/demo.stamp
	$(BIN)/fp4compile demo $(ARGS)

# Files are the units that workers share: a file's tests compile the same things. In their order, for the file with the fewest tests takes longest.
# Who ends in a test that hangs is not replaced, for the next would begin the same file.
test: $(VENV)/test.stamp
	$(BIN)/pytest -n $(JOBS) --max-worker-restart 0 --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

lint: $(VENV)/lint.stamp .lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest tests/test_house_rules.py

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .lint build dist *.egg-info

# torch first: an index that has a CPU build of it gives that one, and nothing later may replace it.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "fp4compile needs python >= 3.11, found " + sys.version.split()[0] + ": run make with PYTHON=python3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	@touch $@

# Lint also types the demo and runs the house rules, so it needs what they import.
$(VENV)/lint.stamp: $(VENV)/demo.stamp $(VENV)/test.stamp

$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install --quiet "$(TORCH)" --editable ".[$*]"
	@touch $@

# The folders under the names they have once installed; type checkers do not read setuptools' package-dir map.
.lint: FORCE
	@rm -rf .lint && mkdir -p .lint/fp4compile
	@cd .lint/fp4compile && ln -s ../../fp4compile/* ../../passes ../../codegen .

FORCE:
