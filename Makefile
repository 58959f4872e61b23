# make demo | ablation | test | torture | check | lock | clean
# Each target makes .venv from the pinned list first; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed.stamp
# The locked versions need this; PYTHON=/path/to/python chooses another interpreter.
NEEDED := 3.11

# Tests fork ranks, which a process that uses a GPU cannot do: tests marked gpu run in a process of their own.
CPU_ONLY := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: install demo ablation test torture check lock clean

install: $(INSTALLED)

$(INSTALLED): requirements.lock setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(NEEDED)".split("."))))' || \
	  { echo "infoxlm: Python $(NEEDED) or newer is needed and $(PYTHON) is $$($(PYTHON) --version 2>&1):" \
	    "run make PYTHON=/path/to/python$(NEEDED)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED)
	bash recipes/demo.sh

ablation: $(INSTALLED)
	bash recipes/ablation.sh

test: $(INSTALLED)
	$(CPU_ONLY) $(BIN)/python -m pytest
ifneq ($(HAS_GPU),0)
	$(BIN)/python -m pytest -m gpu || [ $$? -eq 5 ]  # 5: no such test
endif

torture: $(INSTALLED)
	$(CPU_ONLY) $(BIN)/python -m pytest -m torture --kills 25 -s

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(CPU_ONLY) $(BIN)/python -m pytest -m "not slow"

# What is installed becomes the pinned list, without torch's local build tag and what it brings along for a GPU.
lock:
	$(BIN)/python -m pip freeze --all --exclude-editable > .venv/freeze.txt
	sed -E '/^(nvidia-|cuda-|triton|pip=)/d; s/\+(cpu|cu[0-9]+)$$//' .venv/freeze.txt > requirements.lock
	@touch $(INSTALLED)

clean:
	rm -rf .venv build infoxlm_ds.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
