# make run        sets up, then runs the demo: a small sweep, its table and its figure
# make test       sets up, then runs the tests, JOBS=4 at a time; make test ARGS="-k updates" runs some of them
# make test-all   the same with the slow ones
# make fuzz       sets up, then tries random courses, messages and files, TIMES=20 times as many as test-all, by a seed that is printed
# make lab        sets up, then opens JupyterLab on the notebooks
# make docs       sets up, then makes the site of the documentation, build/docs; make docs EXECUTE="00 01" or EXECUTE=all runs notebooks first

# The Python that makes .venv, and the torch to install where there is none yet. An index of your choice (a CPU build, say)
# goes into PIP_EXTRA_INDEX_URL.
PYTHON ?= python3
TORCH  ?= torch==2.13.0

# Which extras of pyproject.toml are installed; EXTRAS=test,slurm,mpi for a lab on SLURM, and engines under MPI.
EXTRAS ?= test

# Tests that run side by side: two more than two cores, as many wait for processes or for time; JOBS=0 for a debugger. Each job keeps
# the order of the files, so that a lab which a file shares is opened once, and one that is done takes over from the others.
JOBS ?= 4
# Some machines have Python keep no compiled code; several hundred processes of the tests would each compile labkit again.
PYTEST = PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n $(JOBS) --dist worksteal

# Of make fuzz: how many times as many examples as in test-all, and the seed; make fuzz SEED=... tries the same again.
TIMES ?= 20
SEED  := $(or $(SEED),$(shell date +%Y%m%d%H%M))

# An active environment is used as it is (conda's base is not); otherwise .venv is made here.
ENV   := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)),$(CURDIR)/.venv)
PY    := "$(ENV)/bin/python"
READY := "$(ENV)/.labkit-ready"
export PATH := $(ENV)/bin:$(PATH)

.PHONY: run test test-all fuzz lab docs setup install

run: setup
	$(PY) -m labkit demo

test: setup
	$(PYTEST) $(ARGS)

test-all: setup
	$(PYTEST) -m "" $(ARGS)

fuzz: setup
	@echo "make fuzz SEED=$(SEED) TIMES=$(TIMES)"
	LABKIT_FUZZ=$(TIMES) $(PYTEST) -m slow tests/fuzz --hypothesis-seed=$(SEED) $(ARGS)

lab: setup
	$(PY) -m jupyter lab notebooks

docs: setup
	$(PY) -m pip install -q -e ".[docs]"
	$(PY) docs/build.py --execute $(EXECUTE)

# Nothing to do while the environment is younger than pyproject.toml.
setup:
	@test -x $(PY) && test $(READY) -nt pyproject.toml || $(MAKE) --no-print-directory install

# torch comes first, and only where it is missing: a conda build is never replaced by a wheel.
CHECK := -c 'import sys; sys.exit(sys.version_info < (3, 11) and "labkit needs Python 3.11 or newer, and this is \
	%d.%d. Leave the environment or remove .venv, then: make run PYTHON=python3.12" % sys.version_info[:2])'
install:
	@test -x $(PY) || $(PYTHON) $(CHECK)
	test -x $(PY) || $(PYTHON) -m venv "$(ENV)"
	@$(PY) $(CHECK)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q "$(TORCH)"
	$(PY) -m pip install -q -e ".[$(EXTRAS)]"
	@touch $(READY)
