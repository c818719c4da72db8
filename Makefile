# `make` lists the targets. Each target creates .venv if it does not exist.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FUZZ ?= 100000
FUZZERS = $(shell find tests -name 'test_fuzz_*.py')

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz chaos memory audit lint types docs bench results clean

help:  ## list these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-7s %s\n", $$1, $$2}'

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the whole story on built-in data, 15 to 22 minutes on a 2-core CPU
	$(BIN)/attention-transfer demo

test: $(READY)  ## all tests; more of them run where ../shared is present
	$(BIN)/python -m pytest -q -n 2

fuzz: $(READY)  ## every fuzzer at 100,000 examples, ten hours; FUZZ=2000 for 12 minutes
	ATTENTION_TRANSFER_FUZZ=$(FUZZ) $(BIN)/python -m pytest -q -n 2 $(FUZZERS)

chaos: $(READY)  ## kill small runs at every change of a file and at random, about an hour
	PYTHONPATH=tests $(BIN)/python tests/chaos.py

memory: $(READY)  ## 10,000 steps and 1,000 transfers: whether memory stays flat, some minutes
	PYTHONPATH=tests $(BIN)/python tests/memory.py

audit: $(READY)  ## known vulnerabilities of the installed packages, from PyPI (network)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --skip-editable

lint: $(READY)  ## formatting, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## the documentation site, built strictly into site/
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)  ## measure speed as ratios to the authors' step; rewrites results/bench and the tables
	$(BIN)/attention-transfer bench step --json results/bench/step.json
	$(BIN)/attention-transfer bench epoch --rounds 5 --json results/bench/epoch.json
	$(BIN)/attention-transfer bench gradient --rounds 7 --steps 2 --json results/bench/gradient.json
	$(BIN)/attention-transfer bench loss --rounds 9 --steps 3 --json results/bench/loss.json
	$(BIN)/attention-transfer bench teacher --rounds 7 --json results/bench/teacher.json
	$(BIN)/attention-transfer bench data --rounds 5 --json results/bench/data.json
	$(BIN)/attention-transfer bench compile --steps 300 --json results/bench/compile.json
	$(BIN)/python bench/ablation.py --rounds 7 --steps 6 --json results/bench/ablation.json
	$(BIN)/python bench/double_backward.py --rounds 7 --steps 2 --json results/bench/double_backward.json
	$(BIN)/python bench/sweep.py --rounds 5 --steps 4 --json results/bench/sweep.json
	$(BIN)/python bench/sweep_plot.py results/bench/sweep.json docs/scale.png
	$(BIN)/python bench/decoders.py --rounds 5 --json results/bench/decoders.json
	$(BIN)/python -m pip install --quiet --editable '.[peers]'
	$(BIN)/python bench/peer_torchdistill.py --rounds 5 --steps 5 --json results/bench/peer.json
	$(BIN)/python bench/teach_once.py --json results/bench/teach-once.json
	$(BIN)/python bench/tables.py results/bench.md results/gradient.md results/teach-once.md

results: $(READY)  ## write the tables of README, docs and results again, from results/*.jsonl
	$(BIN)/python bench/results_tables.py

clean:  ## remove the environment and what tests and tools left
	rm -rf $(VENV) build dist site .cache .pytest_cache .ruff_cache .mypy_cache
