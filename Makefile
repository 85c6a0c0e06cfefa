# The two commands of the README, and the checks behind them.
#
#   make quickstart   .venv, install, fine-tune a small model on real text
#   make test         the same environment with the test tools, all tests
#
# Nothing is installed again until pyproject.toml, setup.py or constraints.txt change. On a machine without a GPU, point
# PIP_EXTRA_INDEX_URL at PyTorch's CPU builds: they are 4 GB smaller.

VENV ?= .venv
BIN := $(VENV)/bin
# The first Python that is new enough; a name on PATH may be a shim with nothing behind it, so it is run.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
INSTALL := $(BIN)/python -m pip install --prefer-binary --disable-pip-version-check --quiet -c constraints.txt
PACKAGING := pyproject.toml setup.py constraints.txt
SOURCES_CPP = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: quickstart test lint sanitize bench clean

quickstart: $(VENV)/installed
	$(BIN)/fastlora quickstart

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES_CPP)

# The kernels under AddressSanitizer and UBSan, at every instruction set of this CPU.
sanitize: $(VENV)/installed-test
	$(BIN)/cmake -B build/cmake
	$(BIN)/cmake --build build/cmake --parallel
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

bench: $(VENV)/installed-test
	$(BIN)/python -m bench.adapter_tax
	$(BIN)/python -m bench.ops
	$(BIN)/python -m bench.report --readme README.md

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "pyfastlora needs Python 3.11 or newer on PATH (or make PYTHON=/path/to/python)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/installed: $(PACKAGING) | $(VENV)/bin/python
	@echo "Installing into $(VENV): a minute or two"
	@$(INSTALL) -e '.[qlora]'
	@touch $@

$(VENV)/installed-test: $(PACKAGING) | $(VENV)/bin/python
	@echo "Installing into $(VENV) with the test tools: a minute or two"
	@$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/installed
