# make demo | ablation | test | torture | fuzz | check | coverage | same | docs | gpu | release-check | lock | wheelhouse | clean
# Each target except docs, gpu, wheelhouse and clean first makes .venv from the pinned list; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed.stamp
# The oldest Python for the pinned versions; PYTHON=/path/to/python chooses another interpreter.
NEEDED := 3.11

# torch for a GPU brings its own Triton. Without a GPU, tests run the kernels in its interpreter.
TRITON := triton==3.9.0

# Tests fork ranks, and a process that uses a GPU cannot fork: tests marked gpu run in their own process.
CPU_ONLY := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

# A file of tests stays in one process: what its tests share is made once. Three, because many tests wait.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder

export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: install demo ablation test torture fuzz check coverage same docs gpu release-check lock wheelhouse clean

install: $(INSTALLED)

$(INSTALLED): requirements.lock setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(NEEDED)".split("."))))' || \
	  { echo "infoxlm: Python $(NEEDED) or newer is needed and $(PYTHON) is $$($(PYTHON) --version 2>&1):" \
	    "run make PYTHON=/path/to/python$(NEEDED)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps '$(TRITON)' || \
	  echo "no $(TRITON) for this machine: the test of the softmax kernel is skipped"
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED)
	env -u OMP_NUM_THREADS infoxlm demo runs/demo  # training divides the cores among its ranks

ablation: $(INSTALLED)
	bash recipes/ablation.sh

test: $(INSTALLED)
	$(CPU_ONLY) $(BIN)/python -m pytest $(PARALLEL) $(TEST_OPTIONS)
ifneq ($(HAS_GPU),0)
	$(BIN)/python -m pytest -m gpu || [ $$? -eq 5 ]  # 5: no such test
endif

torture: $(INSTALLED)
	$(CPU_ONLY) $(BIN)/python -m pytest -m 'torture or kills' --kills 50 -s

# So many times the made-up inputs of the suite; 100 takes hours.
FUZZ ?= 100
fuzz: $(INSTALLED)
	$(CPU_ONLY) $(BIN)/python -m pytest $(PARALLEL) --timeout 100000 --fuzz $(FUZZ) tests/fuzz

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(CPU_ONLY) $(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# The whole suite, and which lines of the library no test runs.
coverage: $(INSTALLED)
	$(CPU_ONLY) $(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term $(TEST_OPTIONS)

# Does the working tree train as revision REV does, bit by bit? RECIPE and SET="key.path=value ..." choose another recipe.
REV ?= HEAD
same: $(INSTALLED)
	[ -n "$(RECIPE)" ] || infoxlm prep build data_prep/embedded/corpus.yaml runs/demo/corpus
	$(CPU_ONLY) $(BIN)/python benchmarks/same.py $(REV) $(if $(RECIPE),--recipe $(RECIPE)) $(SET)

# The site of docs/ in build/site. Its packages have an environment of their own, which needs neither torch nor .venv.
SITE := build/site-packages
docs:
	$(PYTHON) -m venv $(SITE)
	$(PYTHON) -c 'import configparser; c = configparser.ConfigParser(); c.read("setup.cfg"); \
	  print(c["options.extras_require"]["docs"])' > $(SITE)/requirements.txt
	$(SITE)/bin/python -m pip install --quiet -r $(SITE)/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict  # --quiet would hide what --strict looks for
	@echo "build/site/index.html"

# Does the code run on this machine's GPU, and how fast? Writes runs/gpu/report.md in less than ten minutes. It needs no
# network: without .venv, the packages of $(PYTHON) serve (docs/performance.md).
gpu:
ifeq ($(HAS_GPU),0)
	@echo "infoxlm: make gpu needs a GPU, and nvidia-smi finds none on this machine" >&2; exit 2
else
	env -u OMP_NUM_THREADS $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(GPU_OPTIONS)
endif

# What a release promises beside the suite: installations from wheels alone, and the demo from one. Commit first.
release-check: $(INSTALLED)
	$(CPU_ONLY) $(BIN)/python -m pytest -m release

# Writes the installed versions to the pinned list, without torch's local build tag and without its GPU packages.
lock:
	$(BIN)/python -m pip freeze --all --exclude-editable > .venv/freeze.txt
	sed -E '/^(nvidia-|cuda-|triton|pip=)/d; s/\+(cpu|cu[0-9]+)$$//' .venv/freeze.txt > requirements.lock
	@touch $(INSTALLED)

# Downloads the pinned wheels, except torch, for hosts without a network: make wheelhouse PYTHON=3.12 (docs/hosts.md).
WHEELHOUSE ?= wheelhouse
VERSION = $(or $(filter 3.%,$(PYTHON)),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
PLATFORMS ?= manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
wheelhouse:
	mkdir -p $(WHEELHOUSE)
	sed '/^torch==/d' requirements.lock > $(WHEELHOUSE)/requirements.txt
	grep -vE '^(deepspeed|seqeval)==' $(WHEELHOUSE)/requirements.txt | python3 -m pip download --quiet --no-deps --only-binary=:all: \
	  --dest $(WHEELHOUSE) --python-version $(VERSION) $(PLATFORMS:%=--platform %) -r /dev/stdin
	grep -E '^(deepspeed|seqeval)==' requirements.lock | python3 -m pip wheel --quiet --no-deps --wheel-dir $(WHEELHOUSE) -r /dev/stdin  # have no wheel

clean:
	rm -rf .venv wheelhouse build infoxlm_ds.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
