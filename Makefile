# Three commands for a stranger: `make quickstart`, `make app` and `make test`. What they make stays in this folder.
# Needs Python 3.11 or newer; another interpreter: make PYTHON=python3.12 quickstart

PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/python -m uv pip
PINNED := --constraint constraints.txt --build-constraint constraints.txt

.PHONY: quickstart app test test-fast lint format house constraints dist dist-check gpu-wheels clean
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

# Files to a folder, imports between files, what is long; AT=COMMIT for another commit.
house: .venv/.dev
	$(BIN)/python benchmarks/house.py $(if $(AT),--at $(AT))

# The newest versions that agree with pyproject.toml; run the tests before you commit them.
constraints: .venv/.uv
	@echo '# The versions that continuous integration runs and `make` installs. Renewed by `make constraints`.' > $@.new
	$(UV) compile pyproject.toml --extra all --extra gpu --python $(BIN)/python --no-annotate --no-header >> $@.new
	mv $@.new $@.txt

# The archive of the source, and the wheel that is built from it, in dist/; their metadata and files are looked at.
dist: .venv/.dev
	rm -rf dist
	$(BIN)/python -m uv build --quiet --python $(BIN)/python --build-constraint constraints.txt --out-dir dist
	@rm -f dist/.gitignore
	$(BIN)/python .ci/check_dist.py dist

# The wheel in new environments: bare, [train], [export], [app]. torch is gigabytes, so what the wheel requires is
# links to packages of .venv, and nothing else is there; FULL=1 installs it all anew.
dist-check: dist
	$(BIN)/python .ci/check_dist.py dist --install $(if $(FULL),--full)

# For benchmarks/gpu.sh on a machine without a network, whose torch is there already, and torchvision perhaps.
GPU_PYTHON ?= 3.12
GPU_TORCHVISION ?= 0.26.0
GPU_GLIBC := 5 12 17 24 26 27 28
GPU_MOST_MB := 60

gpu-wheels: .venv/.uv
	rm -rf build/lib build/gpu/wheels
	mkdir -p build/gpu/wheels
	{ grep -v '^torch' constraints.txt; echo torchvision==$(GPU_TORCHVISION); } > build/gpu/constraints.txt
	printf 'torch\ntriton\n' > build/gpu/excluded.txt
	$(UV) compile benchmarks/gpu.txt --quiet --constraint build/gpu/constraints.txt --excludes build/gpu/excluded.txt \
	    --python-version $(GPU_PYTHON) --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --output-file build/gpu/wheels.txt
	sed 's/==.*//' build/gpu/wheels.txt > build/gpu/wheels/needed.txt
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
	    $(foreach n,$(GPU_GLIBC),--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64 \
	    --dest build/gpu/wheels --requirement build/gpu/wheels.txt
	$(BIN)/python -m uv build --quiet --wheel --build-constraint constraints.txt --out-dir build/gpu/wheels
	@rm -f build/gpu/wheels/.gitignore
	@size=`du -sm build/gpu/wheels | cut -f1`; echo "$$size MB in build/gpu/wheels, for Python $(GPU_PYTHON)"; \
	    test $$size -lt $(GPU_MOST_MB) || { echo "that is more than $(GPU_MOST_MB) MB: leave something out of benchmarks/gpu.txt"; exit 1; }

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
