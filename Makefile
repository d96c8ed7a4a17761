# Everything runs from .venv, which the first target that needs it creates.  `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
VLLM := 0.33.0
BIN := $(VENV)/bin
comma := ,
OUT ?= demo-out

# cuda: an NVIDIA driver answers, so torch is the CUDA build and the GPU extras are installed too.
FLAVOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# Without a GPU: an index that has CPU builds of torch. Empty: the configured one if it has them, else PyTorch's.
TORCH_INDEX ?=

PYTORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==//p' constraints/$(FLAVOR).txt)
CONSTRAINTS := constraints/$(FLAVOR).txt
EXTRAS := hf,eval$(if $(filter cuda,$(FLAVOR)),$(comma)triton$(comma)cuda)
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Processes of gpu-test and sanitize, which share the GPU: most of their time goes into compiling kernels.
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc); [ $$n -lt 16 ] || n=16; echo $$n)

# Of the CUDA toolkit. Without torch's memory cache every tensor is an allocation of its own, so its end is the end. Errors of the
# API are Python's exceptions; the bindings ask the driver for functions of newer versions, which memcheck would report.
SANITIZER ?= compute-sanitizer
SANITIZE := env PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --error-exitcode 9 --target-processes application-only
IN_PARTS := seq $(JOBS) | xargs -P $(JOBS) -I{}
MEMCHECK := --tool memcheck --report-api-errors no
PART := $(BIN)/python tests/ops/sanitize.py --part {}/$(JOBS)

# Threads that spin while they wait starve one another where cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

.DEFAULT_GOAL := help
.PHONY: help demo test lint format gpu-test sanitize test-vllm clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "  PYTHON=$(PYTHON)  FLAVOR=$(FLAVOR) (cpu or cuda)  TORCH_INDEX=$(TORCH_INDEX)  OUT=$(OUT) (of make demo)"
	@echo "  JOBS=$(JOBS) (processes of gpu-test and sanitize)"
	@echo "  TORCH_INDEX: a package index with CPU builds of torch, such as $(PYTORCH_CPU_INDEX)"

demo: $(VENV)/.demo-$(FLAVOR) ## generate from a packed cache and measure it against the 16-bit one
	@echo "==> kvturbo demo, files in $(OUT)/"
	@$(BIN)/kvturbo demo --out $(OUT)

test: lint ## lint, then every test that needs no GPU, a wheel's smoke test included
	@echo "==> pytest"
	@$(BIN)/pytest -m "not gpu" -n auto --maxprocesses 4 --dist loadfile

gpu-test: $(VENV)/.dev-$(FLAVOR) ## the tests that need a GPU
	@echo "==> pytest on the GPU"
	@$(BIN)/pytest -m gpu -n $(JOBS) --dist worksteal

test-vllm: $(VLLM_VENV)/.ready ## the plugin's contract with vLLM's own Python, without a GPU
	@echo "==> pytest with vLLM $(VLLM)"
	@$(VLLM_VENV)/bin/python -m pytest -m "not gpu" tests/vllm

sanitize: $(VENV)/.dev-$(FLAVOR) ## every kernel under compute-sanitizer; needs a GPU and the CUDA toolkit
	@command -v $(SANITIZER) >/dev/null || { echo "$(SANITIZER) is not installed; set SANITIZER=path"; exit 1; }
	@echo "==> without the sanitizer, which compiles the kernels: $(JOBS) processes"
	@$(IN_PARTS) $(PART) cuda
	@$(IN_PARTS) $(PART) triton
	@echo "==> memcheck, cuda backend"
	@$(IN_PARTS) $(SANITIZE) $(MEMCHECK) $(PART) cuda
	@echo "==> memcheck, triton backend"
	@$(IN_PARTS) $(SANITIZE) $(MEMCHECK) $(PART) triton
	@echo "==> racecheck, cuda backend"
	@$(IN_PARTS) $(SANITIZE) --tool racecheck $(PART) cuda

lint: $(VENV)/.dev-$(FLAVOR) ## ruff, mypy and the import contracts
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> import contracts"
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev-$(FLAVOR) ## let ruff fix and format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove caches and what the demo wrote
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist site $(OUT)
	find src tests tools models -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	rm -rf $(VENV) $(VLLM_VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); set PYTHON=..."; exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch comes first and alone, so that no other package is taken from the extra index.
$(VENV)/.torch-$(FLAVOR): $(CONSTRAINTS) constraints/common.txt | $(BIN)/python
	@echo "==> installing torch $(TORCH), $(FLAVOR) build"
	@index="$(TORCH_INDEX)"; \
	if [ -z "$$index" ] && [ "$(FLAVOR)-$$(uname -s)" = cpu-Linux ] && \
	    ! $(PIP) index versions torch 2>/dev/null | grep -qF "$(TORCH)+cpu"; then index=$(PYTORCH_CPU_INDEX); fi; \
	$(PIP) install -c $(CONSTRAINTS) $${index:+--extra-index-url "$$index"} torch numpy
	@$(BIN)/python -c 'import torch; print("==> torch", torch.__version__, "CUDA", torch.version.cuda or "none")'
	@[ $(FLAVOR) = cpu ] || $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || \
	    { echo "$(VENV) has a CPU build of torch: run make distclean first, or set FLAVOR=cpu"; exit 1; }
	@touch $@

$(VENV)/.demo-$(FLAVOR): pyproject.toml $(VENV)/.torch-$(FLAVOR)
	@echo "==> installing kvturbo[$(EXTRAS)]"
	@$(PIP) install -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@touch $@

# The tests compile CUDA kernels, which needs NVRTC but no GPU.
$(VENV)/.dev-$(FLAVOR): pyproject.toml $(VENV)/.torch-$(FLAVOR)
	@echo "==> installing kvturbo[$(EXTRAS),triton,cuda,dev]"
	@$(PIP) install -c $(CONSTRAINTS) -e ".[$(EXTRAS),triton,cuda,dev]"
	@touch $@

# vLLM and the packages that its Python imports; torch and the tests' packages are those of $(VENV).
$(VLLM_VENV)/.ready: constraints/vllm.txt $(VENV)/.dev-$(FLAVOR)
	@echo "==> installing vLLM $(VLLM) without its GPU libraries"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -c "import site, subprocess; \
	    base = subprocess.check_output(['$(BIN)/python', '-c', 'import site; print(site.getsitepackages()[0])'], text=True); \
	    open(site.getsitepackages()[0] + '/base.pth', 'w').write(f'import site; site.addsitedir({base.strip()!r})\n')"
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --no-deps vllm==$(VLLM)
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -r constraints/vllm.txt
	@touch $@
