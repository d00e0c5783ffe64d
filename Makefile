# Everything here works from a fresh clone with git, make and python3 (3.9 or newer, with venv).
# make help says what there is.

SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
PREFIX ?= /usr/local
DESTDIR ?=
T ?= all
ARGS ?=
WORKERS ?= 2
COVERAGE_MIN ?= 90

PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist worksteal
STAMP := $(VENV)/.installed
HOME_LIB := $(PREFIX)/lib/audit-archiver

TESTS_unit := tests/unit tests/house tests/contracts
TESTS_stages := tests/stages
TESTS_pipes := tests/pipes
TESTS_crash := tests/crash
TESTS_all := tests

.PHONY: help setup demo demo-clean test crash coverage lint bench scale matrix man man-check trace install clean

help:
	@echo 'make setup        a virtual environment in $(VENV) with everything (PYTHON=python3.12 chooses the Python)'
	@echo 'make demo         archive a real table to a real S3 server on this machine, restore it, and prove it (3 minutes)'
	@echo 'make demo-clean   stop and remove what the demo left running'
	@echo 'make test         all tests; T=unit|stages|pipes|crash for a part, ARGS="-x -k name" for pytest,'
	@echo '                  AA_PG=embedded or AA_PG=11..18 for another PostgreSQL than the one on this machine,'
	@echo '                  WORKERS=$(WORKERS) processes with servers of their own share the tests (0: none, for --pdb)'
	@echo 'make crash        hundreds of kills, broken networks and lying stores under a running application: docs/faults.md'
	@echo '                  (CRASH_JOBS=2 workers, CRASH_MINUTES= ends it earlier, CRASH_SEED= for another order)'
	@echo 'make coverage     which lines of lib the tests reach in process (COVERAGE_MIN= fails below so many per cent)'
	@echo 'make lint         ruff'
	@echo 'make bench        archive and restore against pipes written by hand: speed, memory, CPU (BENCH_ROWS=, BENCH_ROUNDS=)'
	@echo 'make scale        a thousand tables in one run, five million rows in one table (SCALE_TABLES=, SCALE_ROWS=)'
	@echo 'make matrix       every supported PostgreSQL against types, runs and recovery (MATRIX="11 17" for some)'
	@echo 'make man          write what is generated in man/ and docs/ (options, codes, keys, checks); man-check only compares'
	@echo 'make trace        which requirements have a passing test'
	@echo 'make install      into PREFIX=$(PREFIX), under DESTDIR= if given'
	@echo 'make clean        remove caches, build products, demo and bench; $(VENV) stays'

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || { \
	  echo "'$(PYTHON)' is missing or older than 3.9; name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' cannot make virtual environments; install its venv module first" \
	       "(Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	@touch $@

demo:
	@began=$$(date +%s); $(MAKE) --no-print-directory setup && \
	$(PY) tools/demo.py --setup-seconds $$(($$(date +%s) - began))

demo-clean:
	@if test -x $(PY); then $(PY) tools/demo.py --clean; elif test -e demo; then \
	  echo "'$(PY)' is missing: make setup, then make demo-clean" >&2; exit 1; fi

test: setup
	@test -n "$(TESTS_$(T))" || { echo "T=$(T): write unit, stages, pipes, crash or all" >&2; exit 1; }
	$(PYTEST) $(wildcard $(TESTS_$(T))) $(ARGS)

crash: setup
	$(PY) tools/crash.py

coverage: setup
	$(PYTEST) --cov=audit_archiver --cov-report=term-missing:skip-covered --cov-fail-under=$(COVERAGE_MIN) \
	  $(TESTS_unit) $(TESTS_stages) $(TESTS_pipes) $(ARGS)

lint: setup
	$(PY) -m ruff check .

bench: setup
	$(PY) tools/bench.py $(ARGS)

scale: setup
	$(PY) tools/scale.py

matrix: setup
	$(PY) tools/matrix.py

man: setup
	$(PY) tools/man.py && $(PY) tools/checks.py && $(PY) tools/reference.py

man-check: setup
	@for tool in man checks reference; do $(PY) tools/$$tool.py --check || failed=1; done; exit $${failed:-0}

trace: setup
	$(PY) tools/traced.py

install:
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 9))' || { \
	  echo "'$(PYTHON)' is no Python 3.9 or newer with venv; name one: make install PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(DESTDIR)$(HOME_LIB)
	$(DESTDIR)$(HOME_LIB)/bin/python -m pip install --quiet --disable-pip-version-check .
	rm -rf build
	@sh tools/install.sh '$(DESTDIR)' '$(PREFIX)' '$(HOME_LIB)'

clean:
	@if test -e demo; then $(MAKE) --no-print-directory demo-clean; fi
	rm -rf build dist .bench .crash .pytest_cache .hypothesis .ruff_cache .coverage .trace.json lib/*.egg-info *.egg-info
	find lib tests tools schemas -name __pycache__ -type d -prune -exec rm -rf {} +
