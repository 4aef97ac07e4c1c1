# Three commands for a stranger: `make quickstart`, `make app` and `make test`. What they make stays in this folder.
# Needs Python 3.11 or newer; another interpreter: make PYTHON=python3.12 quickstart

PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/python -m uv pip
PINNED := --constraint constraints.txt --build-constraint constraints.txt

.PHONY: quickstart app test test-fast lint format constraints clean
.DELETE_ON_ERROR:

quickstart: .venv/.train
	$(BIN)/mvmr quickstart

# Teacher and student side by side in the browser, on the quickstart's bundle, which is made first where it is not there.
app: .venv/.app
	@test -f runs/quickstart/student/bundle.json || $(BIN)/mvmr quickstart
	$(BIN)/mvmr app runs/quickstart/student

# All that this machine can run: tests marked gpu skip themselves where there is none.
test: .venv/.dev
	$(BIN)/python -m pytest $(ARGS)

test-fast: .venv/.dev
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

# mypy and import-linter walk the file system, where `distill/` is not yet `mvmr.distillation`; they get an
# installed copy. build/lib goes first, because setuptools would pack what an older build left there.
lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/typecheck
	$(UV) install --quiet --python $(BIN)/python --no-deps --target build/typecheck $(PINNED) .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache --package mvmr
	cd build/typecheck && ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The newest versions that agree with pyproject.toml; run the tests before you commit them.
constraints: .venv/.uv
	@echo '# The versions that continuous integration runs and `make` installs. Renewed by `make constraints`.' > $@.new
	$(UV) compile pyproject.toml --extra all --extra gpu --python $(BIN)/python --no-annotate --no-header >> $@.new
	mv $@.new $@.txt

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage

# Stamps: an install runs again only when what it reads has changed.
.venv/.uv: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; \
	$(PYTHON) is `$(PYTHON) --version`. Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "== virtual environment in .venv"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@touch $@

.venv/.train: .venv/.uv pyproject.toml
	@echo "== packages for training (PyTorch is large: the first time takes some minutes)"
	$(UV) install --python $(BIN)/python $(PINNED) --editable '.[train]'
	@touch $@

.venv/.app: .venv/.train
	@echo "== packages for the app"
	$(UV) install --python $(BIN)/python $(PINNED) --editable '.[app]'
	@touch $@

.venv/.dev: .venv/.train
	@echo "== packages for the tests"
	$(UV) install --python $(BIN)/python $(PINNED) --editable '.[dev]'
	@touch $@
