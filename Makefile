# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-oldest test-newest fuzz soak test-cuda lint types format docs api bench bench-cuda clean

demo: .venv/ready
	$(BIN)/pruneforge demo

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow" -n auto --dist worksteal

# With the slow ones, and the coverage.
test-all: .venv/ready
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=
	$(BIN)/python tests/coverage_by_room.py

# With the oldest versions that pyproject.toml allows, and with the newest there are, whatever constraints.txt says.
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13

test-oldest:
	$(OLDEST_PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[dev]'
	.venv-oldest/bin/python -m pytest -m "not slow" -n auto --dist worksteal

test-newest:
	$(NEWEST_PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade uv
	.venv-newest/bin/uv pip install --quiet --python .venv-newest/bin/python --upgrade --editable '.[dev]'
	.venv-newest/bin/python -m pytest -m "not slow" -n auto --dist worksteal

# Damaged and forged files, many of each kind; `make test-all` tries a few.
fuzz: .venv/ready
	PRUNEFORGE_FUZZ=3000 $(BIN)/python -m pytest -m slow tests/fuzz

# Hundreds of runs in one process, and of two processes: memory, handles, results, ends.
soak: .venv/ready
	$(BIN)/python benchmarks/soak.py

# On a machine with a GPU; fails where there is none instead of skipping everything.
test-cuda: .venv/ready
	$(BIN)/python -c "import torch; torch.cuda.is_available() or exit('make test-cuda: torch sees no CUDA device')"
	$(BIN)/python -m pytest -m cuda

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

# A warning fails the build: a broken link, or a public name that is not documented.
docs: .venv/docs
	$(BIN)/python -m sphinx -W --keep-going -n -E -q docs docs/_build/html

# What breaks users of the public names since the last release; fails if UPGRADING.md does not tell them.
# 0.1.0, which has no tag.
REVISION ?= 6b844e8
api: .venv/ready
	$(BIN)/python docs/_ext/breakages.py $(REVISION)

# Against llm-compressor, in an environment of its own, in which PruneForge runs too; an hour or so.
bench: .venv/ready .venv-peers/ready
	$(BIN)/python benchmarks/speed.py --peers .venv-peers/bin/python
	$(BIN)/python benchmarks/costs.py
	$(BIN)/python benchmarks/agreement.py

# On a machine with a GPU: a checkpoint of 7B shape, 128 samples of 2048 tokens, every metric; 60 GB of disk.
bench-cuda: .venv/ready
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-peers docs/_build

# In 0.1.0 this project was called pruneforge; both together share files.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	! $(BIN)/python -m pip show --quiet pruneforge 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes pruneforge
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv-peers/ready: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade pip
	.venv-peers/bin/python -m pip install --quiet --requirement benchmarks/peers.txt
	.venv-peers/bin/python -m pip install --quiet --no-deps --editable .
	touch $@
