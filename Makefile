# Two commands do everything on a machine with Python and make:
#   make demo    environment, install, the main job
#   make test    environment, install, the test suite

PYTHON ?= python3
VENV ?= .venv
# Which torch to install: any requirement pip understands. Takes effect when the environment is made (make clean first).
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := $(VENV)/bin
# Other projects live in an environment of their own, so that the suite never meets them.
PEERS := $(VENV)-peers
# The stacks of the integrations too.
STACKS := $(VENV)-integrations
DEMO ?=
MINUTES ?=
SEED ?=
FUZZ ?=
PYTEST ?=
GPU ?=
GPU_JSON ?= gpu-check.json
# Processes that share the test suite.
WORKERS ?= 2

.PHONY: help demo test test-all test-integrations fuzz check format lint types build gpu-extras
.PHONY: gpu-check bench bench-peers bench-model bench-network precision options planning dynamic overhead blocks clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

# A torch that the system's Python already has (built for its GPU, say) is used as it is, unless TORCH names another one.
KEEP_TORCH := $(if $(filter file default,$(origin TORCH)),$(shell $(PYTHON) -c "import torch" 2>/dev/null && echo yes))

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(if $(KEEP_TORCH),--system-site-packages) $(VENV)
	grep -v '^torch==$(if $(KEEP_TORCH),\|^numpy==)' constraints.txt > $(VENV)/constraints.txt
	$(if $(KEEP_TORCH),,$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt "$(TORCH)" numpy)
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e ".[dev]"
	touch $@

# deepspeed asks for torch while it is built, so torch comes first, and is then left as it is.
$(PEERS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(if $(KEEP_TORCH),--system-site-packages) $(PEERS)
	grep -v '^torch==$(if $(KEEP_TORCH),\|^numpy==)' constraints.txt > $(PEERS)/constraints.txt
	$(if $(KEEP_TORCH),,$(PEERS)/bin/python -m pip install --quiet -c $(PEERS)/constraints.txt "$(TORCH)" numpy)
	$(PEERS)/bin/python -m pip install --quiet -c $(PEERS)/constraints.txt setuptools wheel
	$(PEERS)/bin/python -m pip install --quiet -c $(PEERS)/constraints.txt --no-build-isolation -e ".[peers]"
	touch $@

$(STACKS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(if $(KEEP_TORCH),--system-site-packages) $(STACKS)
	grep -v '^torch==$(if $(KEEP_TORCH),\|^numpy==)' constraints.txt > $(STACKS)/constraints.txt
	$(if $(KEEP_TORCH),,$(STACKS)/bin/python -m pip install --quiet -c $(STACKS)/constraints.txt "$(TORCH)" numpy)
	$(STACKS)/bin/python -m pip install --quiet -c $(STACKS)/constraints.txt -e ".[dev,hf,megatron]"
	touch $@

## make demo      train on packed real documents on one rank and under context parallelism, and compare
demo: $(VENV)/installed
	$(BIN)/python -m cphandler.demo $(DEMO)

## make test      the test suite
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist worksteal $(PYTEST)

## make test-all  the test suite with the slow sweeps
test-all: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST)

## make test-integrations  Hugging Face, Megatron and the other stacks, as released, in an environment of their own
test-integrations: $(STACKS)/installed
	OMP_NUM_THREADS=1 $(STACKS)/bin/python -m pytest -q -m "not slow" -n $(WORKERS) --dist worksteal tests/integrations $(PYTEST)

## make fuzz      random configurations against the dense reference, MINUTES=5 SEED=7 or FUZZ="--case 7:123"
fuzz: $(VENV)/installed
	$(BIN)/python -m cphandler.testing.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(FUZZ)

## make check     format, lint, types and tests; CI runs test-integrations too
check: lint types test

## make format    rewrite the sources in the project's format
format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed
	$(BIN)/mypy

## make gpu-check every kernel, merged rings, real ranks and the demo on this machine's GPU: GPU="--only kernels,ring", no install
gpu-check:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --json $(GPU_JSON) $(GPU)

## make build     wheel and source distribution
build: $(VENV)/installed
	$(BIN)/python -m build --no-isolation

NO_CUDA := is built without CUDA, and these packages compile against it: make clean, then make gpu-extras with a CUDA build

## make gpu-extras  flash-attn and TransformerEngine, compiled without build isolation against the CUDA torch that is there
gpu-extras: $(VENV)/installed
	@$(BIN)/python -c "import sys, torch as t; sys.exit(None if t.version.cuda else f'torch {t.__version__} $(NO_CUDA)')"
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt wheel setuptools ninja psutil packaging
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt --no-build-isolation -e ".[gpu]" \
		"torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')"

## make bench     attention under every backend beside the plain kernel on one rank
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.attention $(BENCH)

## make bench-peers  the same beside other projects, 4096 tokens; BENCH="--lengths 16384 --repeats 21" for more
bench-peers: $(PEERS)/installed
	$(PEERS)/bin/python -m benchmarks.attention --peers --kv-heads 8 --kv-heads 2 \
		--json bench_output/peers.json --plot bench_output/peers.png $(BENCH)

## make bench-model    the demo's whole step: tokens a second, CPU seconds and memory beside one rank
bench-model: $(VENV)/installed
	$(BIN)/python -m benchmarks.model $(BENCH)

## make bench-network  the same step over real links of 1 and 10 Gbit/s; needs root
bench-network: $(VENV)/installed
	$(BIN)/python -m benchmarks.network $(BENCH)

## make precision the error of bfloat16 on 1, 2, 4 and 8 ranks
precision: $(VENV)/installed
	$(BIN)/python -m benchmarks.precision $(BENCH)

## make planning  what layouts move and how level they are, on honest document lengths
planning: $(VENV)/installed
	$(BIN)/python -m benchmarks.planning $(BENCH)

## make dynamic   sub-groups of dynamic context parallelism beside balanced; BENCH="--steps 5" times a step of both
dynamic: $(VENV)/installed
	$(BIN)/python -m benchmarks.dynamic $(BENCH)

## make options   what each option of attention costs, on one rank
options: $(VENV)/installed
	$(BIN)/python -m benchmarks.options $(BENCH)

## make overhead  microseconds of a small call above its kernel, on one rank
overhead: $(VENV)/installed
	$(BIN)/python -m benchmarks.overhead $(BENCH)

## make blocks    by which numbers kernels and exchanges cut their work, timed on this machine
blocks: $(VENV)/installed
	$(BIN)/python -m benchmarks.blocks $(BENCH)

clean:
	rm -rf $(VENV) $(PEERS) $(STACKS) build dist *.egg-info demo_output bench_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
