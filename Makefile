# Needs make and Python 3.11+ (HEADRACE_PYTHON picks one). Everything else goes into .venv.
.DEFAULT_GOAL := help
.PHONY: help venv up down logs status test check bench proto lock lint format-check types imports contracts unit
.PHONY: native test-native explore

PY := .venv/bin/python
STAMP := .venv/.installed
SERVICES := gateway router worker registry analytics drift
# Processes at once. Tests wait half of their time for servers and processes, so there are more of them than cores.
JOBS ?= 2
TEST_JOBS ?= $(shell expr $(JOBS) + 1)

# The tests start some hundred processes. Where Python is told to keep no bytecode beside its sources, each would
# compile all that it imports: what it compiled is kept out of their way instead.
ifdef PYTHONDONTWRITEBYTECODE
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/.headrace/bytecode
endif

help:
	@echo "make up      start the whole platform on this machine and wait until it is ready"
	@echo "make down    stop it; data stays in .headrace"
	@echo "make status  what runs"
	@echo "make logs    what it says (PART=gateway for one part, FOLLOW=1 to go on)"
	@echo "make test    every test"
	@echo "make check   linters, types, import contracts, protobuf contracts, unit tests"
	@echo "make native  compile the hot path now (make up does it in the background)"
	@echo "make test-native  the tests of what is compiled, against what is compiled"
	@echo "make explore properties on examples at random (make test tries the same ones each time)"
	@echo "make bench   measure"
	@echo "make proto   generate the code of the contracts"
	@echo "make lock    resolve the requirements anew"

venv: $(STAMP)

$(STAMP): requirements/dev.txt client/pyproject.toml proto/pyproject.toml deploy/venv.sh
	@env -u PYTHONPYCACHEPREFIX sh deploy/venv.sh
	@touch $@

up: $(STAMP)
	@$(PY) -m deploy.embedded up
	@$(PY) -m deploy.embedded.behind

# These need no installation of what changed meanwhile: a stack that runs can be stopped.
down status:
	@test -x $(PY) || { echo "There is no .venv: Headrace was never started here." >&2; exit 1; }
	@$(PY) -m deploy.embedded $@

logs:
	@test -x $(PY) || { echo "There is no .venv: Headrace was never started here." >&2; exit 1; }
	@$(PY) -m deploy.embedded logs $(if $(FOLLOW),--follow) $(PART)

# The unit tests of services run in environments that hold their own service's dependencies alone, and once is enough
# (tests/integration/test_isolation.py; `make unit` runs them here).
test: $(STAMP)
	$(PY) -m pytest -n $(TEST_JOBS) $(SERVICES:%=--ignore=tests/unit/%)

# The parts run side by side; a part's output appears when it is done.
check: $(STAMP)
	@$(MAKE) --no-print-directory -j$(JOBS) --output-sync=target types unit lint format-check imports contracts

lint: $(STAMP)
	$(PY) -m ruff check .

format-check: $(STAMP)
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy

imports: $(STAMP)
	PYTHONPATH=.:proto:client .venv/bin/lint-imports

contracts: $(STAMP)
	$(PY) proto/generate.py --check

unit: $(STAMP)
	$(PY) -m pytest tests/unit -n $(JOBS)

native: $(STAMP)
	@$(PY) -m deploy.embedded.native

# Everything that imports a compiled module, but whole stacks; the copy stands before the sources on the path.
NATIVE_TESTS ?= tests/unit/common tests/unit/gateway tests/unit/router tests/unit/worker tests/contract tests/property
test-native: native
	$(PY) -m pytest -n $(TEST_JOBS) -o pythonpath="$$($(PY) -m deploy.embedded.native --path) . proto client" \
		$(NATIVE_TESTS)

# Examples that no run tried before; what fails is found again by what is printed.
explore: $(STAMP)
	$(PY) -m pytest -n $(JOBS) --hypothesis-profile=explore tests/property tests/unit

bench: $(STAMP)
	$(PY) -m benchmarks

proto: $(STAMP)
	$(PY) proto/generate.py

lock: $(STAMP)
	$(PY) requirements/lock.py
