# Needs make and Python 3.11 or newer; the first target that needs an environment makes it. `make help` lists targets.

comma := ,
# $(call interpreter,names,condition): the first interpreter that can make environments and meets a condition.
interpreter = $(firstword $(foreach python,$(1),$(shell $(python) -c \
    'import ensurepip, sys, venv; $(2) and print("$(python)")' 2>/dev/null)))
# The pinned versions need Python 3.11.
PYTHON ?= $(call interpreter,python3.11 python3 python,sys.version_info >= (3$(comma) 11))
# Test processes at once; each runs one thread.
JOBS ?= 2
PYTEST_ARGS ?=

tests = $(wildcard $(addprefix tests/test_,$(addsuffix .py,$(1))))
# Tests of bench/, which is not part of the product.
BENCH_TESTS := $(call tests,bench* compare quality* train speed)
# Run once more in Triton's interpreter, which runs the kernels on the CPU.
INTERPRETER_TESTS := $(call tests,kernels kernel_properties diverse library mutants encoder)
# Independent of transformers, so not run again with the oldest one.
WITHOUT_TRANSFORMERS := $(call tests,kernels kernel_properties diverse library mutants reference ops compile picture)
# The oldest supported Triton and the newest, beside the pinned one.
TRITONS := 3.3.0 3.9.0
# The newest transformers, beside the pinned one and the oldest, which constraints-lowest.txt names.
NEWEST := 5.24.0
# The oldest supported Python and the newest, beside the one of the environment.
PYTHONS := 3.10 3.13

# Each process begins with half of the tests in order, so that most files stay in one process with their fixtures.
PYTEST = python -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

VENV := .venv
LOWEST := .venv-lowest
LMMS := .lmms
RAY := .ray
VLLM := .venv-vllm
STAMP := $(VENV)/.installed
LOWEST_STAMP := $(LOWEST)/.installed
LMMS_STAMP := $(LMMS)/.installed
VLLM_STAMP := $(VLLM)/.installed
RAY_STAMP := $(RAY)/.installed

# Nothing here fetches weights: the model that the demo and the tests run is part of the package.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# $(call install,environment,constraints file,extra): setuptools first, so that the pinned one builds the package.
define install
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv found; name one: make PYTHON=..." >&2; exit 1; }
	@echo "installing into $(1) (a few minutes)"
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -qq --progress-bar off -c $(2) setuptools
	$(1)/bin/python -m pip install -qq --progress-bar off -c $(2) --no-build-isolation -e '.[$(3)]'
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo lint clean test test-bench test-slow test-exhaustive test-lowest test-newest test-pythons test-triton test-lmms test-vllm test-ray

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the pinned versions and the package in editable mode

$(STAMP): setup.py constraints.txt
	$(call install,$(VENV),constraints.txt,dev)
	@touch $@

$(LOWEST_STAMP): setup.py constraints.txt constraints-lowest.txt
	@mkdir -p $(LOWEST)
	@awk -F== '/==/ && !seen[$$1]++' constraints-lowest.txt constraints.txt > $(LOWEST)/constraints.txt
	$(call install,$(LOWEST),$(LOWEST)/constraints.txt,test)
	@touch $@

demo: $(STAMP) ## ask the bundled model three questions; pictures in out/
	$(VENV)/bin/hero demo --out out

test: $(STAMP) ## the fast tests, and those of the kernels again in the interpreter
	$(VENV)/bin/$(PYTEST) -m "not slow" $(BENCH_TESTS:%=--ignore=%)
	TRITON_INTERPRET=1 $(VENV)/bin/$(PYTEST) -m "not slow" $(INTERPRETER_TESTS)

test-bench: $(STAMP) ## the fast tests of the benchmarks
	$(VENV)/bin/$(PYTEST) -m "not slow" $(BENCH_TESTS)

test-slow: $(STAMP) ## the slow tests of both, likewise
	$(VENV)/bin/$(PYTEST) -m "slow and not exhaustive"
	TRITON_INTERPRET=1 $(VENV)/bin/$(PYTEST) -m "slow and not exhaustive" $(INTERPRETER_TESTS)

test-exhaustive: $(STAMP) ## the kernels in every configuration, for every target: run it when kernels change
	$(VENV)/bin/$(PYTEST) -m exhaustive
	TRITON_INTERPRET=1 $(VENV)/bin/$(PYTEST) -m exhaustive $(INTERPRETER_TESTS)

test-lowest: $(LOWEST_STAMP) ## the fast tests on the oldest supported transformers, in .venv-lowest
	$(LOWEST)/bin/$(PYTEST) -m "not slow" $(patsubst %,--ignore=%,$(BENCH_TESTS) $(WITHOUT_TRANSFORMERS))

test-newest: $(STAMP) .newest/$(NEWEST) ## the same on the newest transformers, in .newest
	PYTHONPATH=.newest/$(NEWEST) $(VENV)/bin/$(PYTEST) -m "not slow" \
	    $(patsubst %,--ignore=%,$(BENCH_TESTS) $(WITHOUT_TRANSFORMERS))

.newest/%: | $(STAMP)
	$(VENV)/bin/python -m pip install -qq --progress-bar off --no-deps --target $@.part transformers==$*
	mv $@.part $@

test-pythons: $(PYTHONS:%=test-python-%) ## what needs no torch, on the oldest and the newest Python, if they are installed

test-python-%: PYENV = $(wildcard $(HOME)/.pyenv/versions/$*.*/bin/python)
test-python-%:
	@set -e; python='$(call interpreter,python$* $(PYENV),True)'; \
	if [ -z "$$python" ]; then echo "Python $*: not installed, not tested"; exit 0; fi; \
	echo "Python $*: $$python"; \
	$$python -m venv .venv-python$*; \
	.venv-python$*/bin/python -m pip install -qq --progress-bar off -c constraints.txt pytest packaging setuptools; \
	.venv-python$*/bin/python -m compileall -q hero hero_kernels bench tests; \
	.venv-python$*/bin/python -m pytest -q -k "not loads_its_model" tests/test_config.py tests/test_packaging.py $(PYTEST_ARGS)

test-triton: $(STAMP) $(TRITONS:%=.triton/%) ## compile the kernels with the oldest and the newest Triton, in .triton
	for version in $(TRITONS); do \
	    echo "Triton $$version"; \
	    PYTHONPATH=.triton/$$version $(VENV)/bin/$(PYTEST) -m "not exhaustive" tests/test_compile.py || exit 1; \
	done

.triton/%: | $(STAMP)
	$(VENV)/bin/python -m pip install -qq --progress-bar off --no-deps --target $@.part triton==$*
	mv $@.part $@

test-lmms: $(STAMP) $(LMMS_STAMP) ## the model for lmms-eval, with lmms-eval in .lmms
	PYTHONPATH=$(CURDIR)/$(LMMS) $(VENV)/bin/$(PYTEST) tests/test_lmms_eval.py

$(LMMS_STAMP): requirements-lmms.txt | $(STAMP)
	@rm -rf $(LMMS)
	$(VENV)/bin/python -m pip install -qq --progress-bar off --no-deps --target $(LMMS) -r requirements-lmms.txt
	@touch $@

test-vllm: $(VLLM_STAMP) ## the plug-in for vLLM, in .venv-vllm, which takes 2.5 GB
	$(VLLM)/bin/python -m pytest -q $(PYTEST_ARGS) tests/test_vllm.py tests/test_vllm_families.py tests/test_vllm_server.py

$(VLLM_STAMP): setup.py requirements-vllm.txt tests/vllm_environment.py
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv found; name one: make PYTHON=..." >&2; exit 1; }
	@echo "installing into $(VLLM) (a few minutes)"
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install -qq --progress-bar off --no-deps -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip install -qq --progress-bar off --no-deps --no-build-isolation -e .
	$(VLLM)/bin/python tests/vllm_environment.py
	@touch $@

test-ray: $(STAMP) $(RAY_STAMP) ## batch inference on Ray, with Ray in .ray; one process, since Ray starts its own
	PYTHONPATH=$(CURDIR)/$(RAY) $(VENV)/bin/$(PYTEST) -n 0 tests/test_ray.py

$(RAY_STAMP): requirements-ray.txt | $(STAMP)
	@rm -rf $(RAY)
	$(VENV)/bin/python -m pip install -qq --progress-bar off --no-deps --target $(RAY) -r requirements-ray.txt
	@touch $@

lint: $(STAMP) ## ruff, and mypy: the packages, and a strictly typed program that uses the public API
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file= --strict --follow-imports=silent tests/typing_api.py

clean: ## remove what the other targets made
	rm -rf $(VENV)* $(LMMS) $(RAY) .triton .newest out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
