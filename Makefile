# make demo    sets everything up and runs the main job: trains a small GPT with naive attention and with ours
# make test    sets everything up and runs the tests
# The set-up lives in .venv unless a virtual environment is active. The second time only what changed is done.

PYTHON ?= python3
TORCH  ?= torch==2.11.0
ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := .venv
endif
PY := $(VENV)/bin/python
STATE := $(VENV)/.flash_attn_ext
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

export FLASH_ATTN_EXT_BUILD_DIR := $(CURDIR)/build/objects
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help build demo test gpu-check gpu-races gpu-sanitize lint format sanitize planted-faults bench build-times doctor clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STATE)/venv:
	@sh tools/check_prerequisites.sh $(PYTHON)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STATE) && touch $@

# An active environment's own PyTorch (2.11 or newer) is kept, and stands in the list so that pip heeds its limits
# (2.11 wants setuptools below 82).
$(STATE)/packages: $(STATE)/venv pyproject.toml
	@$(PY) -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null \
	  || { echo "installing $(TORCH) (about a minute)"; $(PY) -m pip install -q '$(TORCH)'; }
	@$(PY) tools/requirements.py build test bench lint > $(STATE)/requirements.txt
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(STATE)/requirements.txt
	@$(PY) -m pip install -q -r $(STATE)/requirements.txt
	@touch $@

$(STATE)/built: $(STATE)/packages $(SOURCES)
	@echo "building flash_attn_ext"
	@$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

build: $(STATE)/built ## build and install into the environment (editable)

demo: build ## train a small GPT on real text with naive attention and with ours; plots under runs/
	@$(PY) examples/train_gpt.py $(ARGS)

test: build ## the test suite (ARGS="-k name" selects)
	@$(PY) -m pytest $(ARGS)

GPU_BENCH = $(PY) -m flash_attn_ext bench --device cuda --rounds 7 --sample-ms 4
RECORDS = benchmarks/results
gpu-check: build ## the GPU tests, then the benchmarks; their records go to benchmarks/results/
	@$(PY) -m pytest -m gpu $(ARGS)
	@$(GPU_BENCH) --grid h100 --directions fwd --peers cudnn,fa2,fa3,fa4 --json $(RECORDS)/bench_h100_fwd_cuda.json
	@$(GPU_BENCH) --grid h100 --directions bwd --peers cudnn,fa2,deterministic,fa4 --json $(RECORDS)/bench_h100_bwd_cuda.json
	@$(PY) -m flash_attn_ext bench --device cuda --grid origin --rounds 9 --json $(RECORDS)/bench_origin_cuda.json

gpu-races: build ## the Hopper kernels with random delays at every barrier, and with bounded waits
	@for debug in delays barriers; do bash tools/debug_driver.sh $$debug && build/cuda_driver_$$debug --many 20 || exit 1; done

gpu-sanitize: build ## compute-sanitizer over every CUDA kernel
	@bash tools/compute_sanitizer.sh $(ARGS)

lint: $(STATE)/packages ## ruff, clang-format, include rules
	@PATH="$(abspath $(VENV))/bin:$$PATH" sh tools/lint.sh

format: $(STATE)/packages ## let ruff and clang-format rewrite the sources
	@PATH="$(abspath $(VENV))/bin:$$PATH" sh tools/lint.sh --fix

sanitize: build ## AddressSanitizer and UBSan over the CPU engine
	@PATH="$(abspath $(VENV))/bin:$$PATH" PYTHON=$(abspath $(PY)) bash tools/sanitize.sh

planted-faults: build ## small faults planted into a copy of the engine: the suite has to catch each
	@$(PY) tests/planted_faults.py $(ARGS)

bench: build ## ours beside PyTorch's CPU attention (ARGS="--grid cpu-quick" and others)
	@$(PY) -m flash_attn_ext bench $(ARGS)

build-times: ## seconds that each file took to compile in the last build
	@$(PYTHON) tools/build_times.py $(FLASH_ATTN_EXT_BUILD_DIR)

doctor: build ## what is installed, what it can run, a self-test
	@$(PY) -m flash_attn_ext doctor

clean: ## remove what the build made (not the environment)
	rm -rf build dist *.egg-info flash_attn_ext/*.so flash_attn_ext/build.json $(STATE)/built
