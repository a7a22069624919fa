# make quickstart   train a small Mixtral on this machine's own Python files, then sample from it
# make test         the tests, but those that take longest
# make test-slow    those
# make lint         ruff check and ruff format --check
# make setup        only the virtual environment, in .venv
# make clean        removes the environment and caches; runs/ stays
#
# Variables: PYTHON (3.11 or newer), ARGS (more arguments for train.py or pytest), WORKERS
# (processes that share the tests, of up to 5 GB each):
#   make quickstart PYTHON=python3.12 ARGS="training.steps=50 mesh.expert=2"
#   make test ARGS="-k router -x"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2

RUN := $(or $(patsubst run.dir=%,%,$(lastword $(filter run.dir=%,$(ARGS)))),runs/quickstart)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Stamps: newer than the requirements file that was installed last.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_TPU := $(VENV)/.installed-tpu

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev quickstart test test-slow lint clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(INSTALLED)

setup-dev: $(INSTALLED_DEV)

quickstart: setup
	@$(BIN)/python train.py --config configs/quickstart.yaml $(ARGS)
	@echo
	@$(BIN)/python generate.py --checkpoint $(RUN) \
	    --prompt-file configs/quickstart_prompts.txt \
	    --max-new-tokens 64 --temperature 0.7 --top-p 0.95 --seed 0
	@echo
	@echo "The run is in $(RUN):"
	@echo "  $(RUN)/report.png      loss, load balance, share of tokens per expert"
	@echo "  $(RUN)/metrics.jsonl   the same as numbers, one JSON object a line"
	@echo "  $(RUN)/checkpoints     weights, optimizer, data position, tokenizer"
	@echo "  $(RUN)/config.yaml     the whole configuration"
	@echo "More: $(BIN)/python generate.py --checkpoint $(RUN) --prompt 'def main('"

test: setup-dev $(INSTALLED_TPU)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

test-slow: setup-dev $(INSTALLED_TPU)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m slow $(ARGS)

lint: setup-dev
	$(BIN)/ruff check --extend-exclude ".venv*" .
	$(BIN)/ruff format --check --extend-exclude ".venv*" .

clean:
	rm -rf .venv .venv312 .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Runs again over a half-made environment, which it completes.
$(INSTALLED): requirements.txt
	@command -v $(PYTHON) > /dev/null || { \
	    echo "error: $(PYTHON) is not on PATH; Python 3.11 or newer is needed (make PYTHON=...)" >&2; \
	    exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "error: $(PYTHON) is Python %d.%d; 3.11 or newer is needed (make PYTHON=python3.11 ...)" \
	    % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || $(PYTHON) -c 'import sys; sys.exit( \
	    "error: this Python cannot make virtual environments; on Debian and Ubuntu: " \
	    "sudo apt install python%d.%d-venv" % sys.version_info[:2])'
	@echo "installing $< into $(VENV) (a minute or two)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) -r $<
	@touch $@

$(INSTALLED_DEV): requirements-dev.txt $(INSTALLED)
	@echo "installing $< into $(VENV)"
	@$(PIP) -r $<
	@touch $@

# The TPU compiler, for the tests that compile for TPU topologies; they skip where it cannot be had.
$(INSTALLED_TPU): requirements-tpu.txt $(INSTALLED)
	@echo "installing $< into $(VENV): the tests that compile for TPU want it"
	@$(PIP) -r $< || echo "libtpu cannot be installed here: the tests that compile for TPU will skip"
	@touch $@
