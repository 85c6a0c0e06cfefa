# The two commands of the README, and the checks behind them.
#
#   make quickstart   .venv, install, fine-tune a small model on real text
#   make test         the same environment with the test tools, all tests
#   make test-peft    PEFT's own tests, with every model patched
#   make gpu          on a machine with a GPU: build, test and measure there, ten minutes
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

.PHONY: quickstart test test-peft test-oldest test-newest lint sanitize bench gpu clean

quickstart: $(VENV)/installed
	$(BIN)/fastlora quickstart

# A process per core; what tests of one file share is made once. Threads that wait sleep, as every core is wanted.
test: $(VENV)/installed-test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# From PEFT's source distribution, of the version that is installed. PEFT holds options: make test-peft PEFT=--list.
test-peft: $(VENV)/installed-test-peft
	$(BIN)/python -m tests.peft_suite $(PEFT)

# Patching and the families with the oldest and the newest transformers and PEFT: what differs lies over .venv.
test-oldest test-newest: test-%: $(VENV)-%/installed
	OMP_NUM_THREADS=1 $(VENV)-$*/bin/python -m pytest -q tests/patching tests/families

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES_CPP)
	$(BIN)/python -m bench.report --check-readme README.md

# The CPU's kernels as a library, and under AddressSanitizer and UBSan at every instruction set of this CPU.
sanitize: $(VENV)/installed-test
	$(BIN)/cmake -B build/cmake
	$(BIN)/cmake --build build/cmake --target fastlora_kernels kernels_test --parallel
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

bench: $(VENV)/installed-test
	$(BIN)/python -m bench.adapter_tax
	$(BIN)/python -m bench.ops
	$(BIN)/python -m bench.basics
	$(BIN)/python -m bench.report --readme README.md

# With the Python on PATH where its torch sees the GPU: a CUDA build of torch is gigabytes, and not to be had everywhere.
# GPU holds options: make gpu GPU="--wheels wheels --minutes 9".
gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		$(PYTHON) -m bench.gpu $(GPU); \
	else \
		$(MAKE) --no-print-directory $(VENV)/installed-test && $(BIN)/python -m bench.gpu $(GPU); \
	fi

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist *.egg-info

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

$(VENV)/installed-test-peft: $(VENV)/installed-test
	@$(INSTALL) -e '.[test-peft]'
	@touch $@

SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

$(VENV)-%/installed: constraints-%.txt $(VENV)/installed-test
	@echo "Installing into $(@D) what differs from $(VENV)"
	@rm -rf $(@D)
	@$(BIN)/python -m venv --without-pip $(@D)
	@echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" > "$$($(@D)/bin/python $(SITE))/tested.pth"
	@$(BIN)/python -m pip --python $(@D)/bin/python install --disable-pip-version-check --quiet --no-deps -r $<
	@$(BIN)/python -m pip --python $(@D)/bin/python check
	@touch $@
