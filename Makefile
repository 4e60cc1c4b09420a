# `make` prints the targets. Each one that needs it makes .venv first: `make test PYTHON=python3.12` chooses the Python.
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
NB     ?= $(sort $(shell find nbs -name "*.ipynb" -not -path "*/.*"))
PORT   ?= 8888

export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test docs serve lab bench bench-attention test-triton export clean-nbs run readme py nb hooks clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# pip, not uv: the pinned CPU build of torch must be found wherever pip finds it
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "pc_transformer needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "$(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv"; rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,docs,experiments,notebooks]'
	@touch $@

install: $(STAMP) ## make .venv with the pinned packages

demo: $(STAMP) ## train a standard GPT, ours by backprop and ours by predictive coding on Tiny Shakespeare; compare
	$(BIN)/pct run demo --out runs/demo

test: $(STAMP) ## every check: notebooks, package, README, types, docs, tests
	$(BIN)/python tools/check.py

docs: $(STAMP) ## build the site into _docs (no Quarto, no network)
	$(BIN)/python tools/build_docs.py

serve: docs ## build the site and serve it on this machine
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs $(PORT)

lab: $(STAMP) ## open JupyterLab on the first chapter
	$(BIN)/jupyter lab --port $(PORT) nbs/0_theory/00_notation.ipynb

bench: $(STAMP) ## step time and peak memory of each learner on this machine, interleaved
	$(BIN)/pct bench --out runs/bench

bench-attention: $(STAMP) ## time and memory of every attention family and backend against PyTorch's own: QUICK=true for a minute
	$(BIN)/pct bench-attention --out $(or $(OUT),runs/attention_speed) --quick $(or $(QUICK),false)

test-triton: $(STAMP) ## the Triton kernels in its interpreter and, ahead of time, for two GPUs (installs 1 GB; half an hour)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[triton]'
	$(BIN)/python -m pytest -q tests/attention/test_gpu_kernels.py
	$(BIN)/python tools/compile_triton.py

export: $(STAMP) ## notebooks -> package, order of reading and README
	$(BIN)/nbdev_clean
	$(BIN)/python tools/export.py
	$(BIN)/python tools/make_order.py
	$(BIN)/python tools/make_readme.py

clean-nbs: $(STAMP) ## strip what changes from run to run from the notebooks
	$(BIN)/nbdev_clean

run: $(STAMP) ## run notebooks and save their outputs: make run NB=nbs/1_model/14_layers.ipynb
	$(BIN)/python tools/run_notebooks.py $(NB)

readme: $(STAMP) ## nbs/index.ipynb -> README.md
	$(BIN)/python tools/make_readme.py

py: $(STAMP) ## notebook -> .nbpy/, to edit it as text: make py NB=nbs/1_model/14_layers.ipynb
	$(BIN)/python tools/percent.py to $(NB)

nb: $(STAMP) ## .nbpy/ -> notebook: make nb NB=nbs/1_model/14_layers.ipynb
	$(BIN)/python tools/percent.py from $(NB)

hooks: $(STAMP) ## git merges notebooks cell by cell, and JupyterLab saves them clean
	$(BIN)/nbdev_install_hooks

clean: ## remove what was built, but neither .venv nor runs/
	rm -rf _docs _proc reference build dist .nbpy .pytest_cache .hypothesis .ruff_cache *.egg-info
	find pc_transformer nbs tests tools -name __pycache__ -prune -exec rm -rf {} +
