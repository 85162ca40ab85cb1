# Everything runs from a virtual environment that these targets make themselves: Python >= 3.11 and make are all that is needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test check bench soak docs lock clean help

help:             ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Flyball needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Say: make PYTHON=/path/to/python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 -m venv does not work here; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $(READY)

demo: $(READY)    ## the main job, live in the terminal, under two minutes
	$(BIN)/flyball demo

test: $(READY)    ## the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)   ## lint, format, types, architecture, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_docs.py

bench: $(READY)   ## measure every bar against its baseline; writes build/bench.json
	$(BIN)/python -m benchmarks

soak: $(READY)    ## long runs: kill -9 at 100 points, many seeds
	$(BIN)/python -m pytest -m soak -o addopts="-q --strict-markers --import-mode=importlib"

docs: $(READY)    ## regenerate the generated parts of docs/
	$(BIN)/python -m docs.generate

lock:             ## renew requirements/*.txt (needs uv)
	uv pip compile -q --universal --python-version 3.11 --group dev pyproject.toml -o requirements/dev.txt --no-header --no-annotate

clean:            ## remove what was made
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
