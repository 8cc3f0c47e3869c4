# Needs make and Python 3.11 or newer; the first target that wants an environment makes it. `make help` lists.

# The first interpreter that the pinned versions install on and that can make an environment.
PYTHON ?= $(firstword $(foreach python,python3.11 python3 python,$(shell $(python) -c \
    'import ensurepip, sys, venv; sys.version_info >= (3, 11) and print("$(python)")' 2>/dev/null)))
PYTEST_ARGS ?=

# Run again in Triton's interpreter, where the CPU runs the kernels.
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,kernels kernel_properties library mutants encoder))
# The oldest supported Triton and the newest, beside the pinned one.
TRITONS := 3.3.0 3.9.0

BOTH = $(MAKE) --no-print-directory -j2 -Otarget test-here test-interpreter

VENV := .venv
LOWEST := .venv-lowest
LMMS := .lmms
STAMP := $(VENV)/.installed
LOWEST_STAMP := $(LOWEST)/.installed
LMMS_STAMP := $(LMMS)/.installed

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
.PHONY: help setup demo test test-slow test-lowest test-triton test-lmms test-exhaustive test-here test-interpreter lint clean

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

test: $(STAMP) ## the fast tests, and those of the kernels again in the interpreter, side by side
	@$(BOTH) MARK="not slow"

test-slow: $(STAMP) ## the slow tests, likewise
	@$(BOTH) MARK="slow and not exhaustive"

test-exhaustive: $(STAMP) ## the kernels at every configuration, for every target: when kernels change
	@$(BOTH) MARK=exhaustive

test-here: $(STAMP)
	$(VENV)/bin/python -m pytest -q -m "$(MARK)" $(PYTEST_ARGS)

test-interpreter: $(STAMP)
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -q -m "$(MARK)" $(KERNEL_TESTS) $(PYTEST_ARGS)

test-lowest: $(LOWEST_STAMP) ## the fast tests on the oldest supported transformers, in .venv-lowest
	$(LOWEST)/bin/python -m pytest -q -m "not slow" $(PYTEST_ARGS)

test-triton: $(STAMP) $(TRITONS:%=.triton/%) ## compile the kernels with the oldest and the newest Triton, in .triton
	for version in $(TRITONS); do \
	    echo "Triton $$version"; \
	    PYTHONPATH=.triton/$$version $(VENV)/bin/python -m pytest -q -m "not exhaustive" tests/test_compile.py $(PYTEST_ARGS) || exit 1; \
	done

.triton/%: | $(STAMP)
	$(VENV)/bin/python -m pip install -qq --progress-bar off --no-deps --target $@.part triton==$*
	mv $@.part $@

test-lmms: $(STAMP) $(LMMS_STAMP) ## the model for lmms-eval, with lmms-eval in .lmms
	PYTHONPATH=$(CURDIR)/$(LMMS) $(VENV)/bin/python -m pytest -q tests/test_lmms_eval.py $(PYTEST_ARGS)

$(LMMS_STAMP): requirements-lmms.txt | $(STAMP)
	@rm -rf $(LMMS)
	$(VENV)/bin/python -m pip install -qq --progress-bar off --no-deps --target $(LMMS) -r requirements-lmms.txt
	@touch $@

lint: $(STAMP) ## ruff
	$(VENV)/bin/ruff check .

clean: ## remove what the other targets made
	rm -rf $(VENV) $(LOWEST) $(LMMS) .triton out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
