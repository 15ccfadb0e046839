# Two commands do everything: `make run` and `make test`. Each makes .venv first where it is missing.
# PYTHON picks the interpreter (3.11 or newer). TORCH_INDEX, where set, is an extra package index to take
# torch from; with https://download.pytorch.org/whl/cpu pip chooses the CPU build and saves gigabytes of CUDA.
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?= ep=320
BIN := .venv/bin
STAMP := .venv/.installed
JOBS ?= 2

.PHONY: run test full lint types format clean help gpu gpu-test gpu-bench gpu-fabric gpu-wheels
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"moe_runtime needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.11 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing into .venv (minutes the first time)'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[dev]'
	@touch $@

run: $(STAMP) ## run the demo model on 320 virtual ranks (other settings: make run ARGS="ep=8 tp=2")
	$(BIN)/python -m moe_runtime $(ARGS)

test: $(STAMP) ## the CPU test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" tests

full: $(STAMP) ## the CPU test suite and the slow tests (wheel install, long sweeps)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests

lint: $(STAMP) ## ruff, as in .ci/run
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict on all packages and tests
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite the files
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# On a machine with a GPU, from a bare checkout: the python there brings torch and triton, nothing is installed.
# Wheels that `make gpu-wheels` fetched before, on a machine with a package index, are unpacked beside the checkout.
GPU_PYTHON ?= python3
GPU_WHEELS := .whl
GPU_SITE := .whl/site
GPU_ENV := PYTHONPATH=.:kernels:models:tools:$(GPU_SITE)

gpu: gpu-test gpu-bench ## GPU tests, then GPU benchmarks

gpu-test: $(GPU_SITE) ## the Triton kernels' tests on a CUDA device, and the demo model end to end
	$(GPU_ENV) $(GPU_PYTHON) -m pytest -q -rs -n 8 -p no:cacheprovider tests/kernels tests/tools/test_slice.py tests/gpu \
	  -k "triton or gpu"

gpu-bench: $(GPU_SITE) ## kernels and one rank's layer against their floors, into docs/measurements/gpu.jsonl
	$(GPU_ENV) $(GPU_PYTHON) -m moe_tools.bench kernels; status=$$?; \
	$(GPU_ENV) $(GPU_PYTHON) -m moe_tools.bench slice && exit $$status

gpu-fabric: $(GPU_SITE) ## dispatch fabrics as far as one GPU goes, in 8 minutes, into docs/measurements/gpu.jsonl
	$(GPU_ENV) $(GPU_PYTHON) -m moe_tools.bench fabric

gpu-wheels: ## fetch the few wheels that the end-to-end GPU tests need where there is no package index
	$(PYTHON) -m pip download -q --no-deps -d $(GPU_WHEELS) -c constraints.txt --python-version 3.12 \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
	  --platform manylinux2014_x86_64 --only-binary=:all: greenlet hydra-core omegaconf
	$(PYTHON) -m pip wheel -q --no-deps -w $(GPU_WHEELS) antlr4-python3-runtime==4.9.3

$(GPU_SITE):
	@mkdir -p $@
	@if ls $(GPU_WHEELS)/*.whl >/dev/null 2>&1; then \
	  $(GPU_PYTHON) -m pip install -q --no-index --no-deps --no-compile --target $@ $(GPU_WHEELS)/*.whl; fi

clean: ## remove the environment, caches and build outputs
	rm -rf .venv dist build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
