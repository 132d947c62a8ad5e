# `make help` lists the targets.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
LMMS_VENV  := .venv-lmms
LMMS_STAMP := $(LMMS_VENV)/.installed
LAUNCHER ?= local

.DEFAULT_GOAL := help
.PHONY: help install lmms demo test test-lmms check format ui backbones lock

help: ## this list
	@grep -hE '^[a-zA-Z_%-]+:.*?## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sed 's/%/NAME/' | expand -t 16
	@echo "NAME is a file of experiments/: $(notdir $(basename $(wildcard experiments/*.yaml)))"

install: $(STAMP) ## set everything up in .venv (needs python3 >= 3.11)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "installing into $(VENV): about 6 GB, a few minutes"
	@test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --upgrade pip uv; }
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

lmms: $(LMMS_STAMP) ## set lmms-eval up in .venv-lmms: it needs older versions of some packages

$(LMMS_STAMP): requirements-lmms.lock pyproject.toml $(STAMP)
	@echo "installing into $(LMMS_VENV): a minute; uv links what $(VENV) has already"
	@test -x $(LMMS_VENV)/bin/python || $(PYTHON) -m venv $(LMMS_VENV)
	@$(BIN)/uv pip install --quiet --python $(LMMS_VENV)/bin/python --require-hashes -r requirements-lmms.lock
	@$(BIN)/uv pip install --quiet --python $(LMMS_VENV)/bin/python --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## train, evaluate and tabulate 2 LLMs x 2 vision encoders on scanned digits
	@$(BIN)/python -m morebench.train -m experiments=digits
	@$(BIN)/python -m morebench.report experiments=digits

plan-%: $(STAMP) ## what an experiment will run and what is done
	@$(BIN)/python -m morebench.plan experiments=$*

sweep-%: $(STAMP) ## run what an experiment is missing (LAUNCHER=local)
	@$(BIN)/python -m morebench.train -m experiments=$* hydra/launcher=$(LAUNCHER)

report-%: $(STAMP) ## tables, figures and a page of an experiment
	@$(BIN)/python -m morebench.report experiments=$*

ui: $(STAMP) ## browse the runs in MLflow on http://127.0.0.1:5000
	@MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

test: $(STAMP) ## run the tests
	@$(BIN)/pytest -n auto --dist loadfile

test-lmms: $(LMMS_STAMP) ## run a tiny model under lmms-eval's own command
	@$(BIN)/pytest tests/test_lmms_eval.py -rs

check: $(STAMP) ## format, lint, types, layers
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(STAMP) ## format the code and mend what lint can mend
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

backbones: $(STAMP) ## write docs/backbones.md again: tokens, widths, parameters, FLOPs, memory of every cell
	@$(BIN)/python -m morebench.check \
	  llm=gemma2_2b,phi4,llama31_8b,deepseek_r1_llama_8b,gemma2_9b,vicuna_7b,llama3_8b,phi2 \
	  vision=clip,dinov2,dinov2_reg,siglip,siglip2 resolution=native,s2 table=docs/backbones.md

lock: ## resolve requirements.lock and requirements-lmms.lock again
	@$(BIN)/uv pip compile pyproject.toml --extra dev --extra deepspeed --generate-hashes --no-emit-index-url --universal \
	  --python-version 3.11 --quiet -o requirements.lock
	@cp requirements.lock requirements-lmms.lock # uv keeps the versions that it finds there
	@$(BIN)/uv pip compile pyproject.toml --extra dev --extra deepspeed --extra lmms --generate-hashes --no-emit-index-url \
	  --universal --python-version 3.11 --quiet -o requirements-lmms.lock
