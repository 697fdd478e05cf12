# make demo     set everything up and run the main job on the shipped model
# make test     set everything up, lint, check types, run the tests
# make bench    the benchmark's table for the shipped model
#
# Everything lives in .venv (override: VENV=…). Stamps in .venv/.stamps make the second run quick.

PYTHON ?= python3
VENV ?= .venv
# Given to pip for torch alone, say an --index-url that serves builds without CUDA.
TORCH_ARGS ?=
# Two processes; a file's tests stay in one, since they share what they export. tests/conftest.py orders the files.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
BUNDLE ?= build/coder-q8_0

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: setup demo test bench lint types format llamacpp clean distclean

setup: $(STAMPS)/package

demo: setup
	$(BIN)/python samples/demo.py

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: setup
	@test -e $(BUNDLE)/manifest.json || $(BIN)/skipstone export samples/models/coder \
		--device cpu --format gguf --quantize q8_0 --output $(BUNDLE)
	$(BIN)/skipstone bench $(BUNDLE) --prompts samples/prompts/code.jsonl --max-new-tokens 96

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	@$(BIN)/python tools/link_packages.py
	$(BIN)/mypy -p skipstone
	$(BIN)/mypy tools
	$(BIN)/mypy -p samples.corrector

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Chooses the compiler again (after installing clang, say), whatever the stamp says.
llamacpp: $(STAMPS)/torch
	$(BIN)/python tools/build_llamacpp.py
	@touch $(STAMPS)/llamacpp

clean:
	rm -rf build dist skipstone.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV)

# Debian's python3 may be older, and a newer one may lack wheels: take the first that fits.
$(STAMPS)/venv:
	@chosen=; for candidate in "$(PYTHON)" python3 python3.13 python3.12 python3.11; do \
		if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
		then chosen=$$candidate; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
		echo "error: Skipstone needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." >&2; \
		echo "       Install one and name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "setting up $(VENV) with $$chosen ($$($$chosen -V))"; \
	test -x $(BIN)/python || "$$chosen" -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch goes first and alone: whatever pulls it in otherwise may bring another build.
$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	$(PIP) pip setuptools
	$(PIP) $(TORCH_ARGS) torch
	@touch $@

$(STAMPS)/llamacpp: $(STAMPS)/torch tools/build_llamacpp.py
	$(BIN)/python tools/build_llamacpp.py
	@touch $@

# An ordinary editable install finds new modules by itself; only the mapping in pyproject.toml is fixed by it.
$(STAMPS)/package: $(STAMPS)/llamacpp pyproject.toml setup.py
	$(PIP) --no-build-isolation -e ".[llamacpp,export,executorch,onnx,qualcomm,webgpu,samples,dev]"
	@touch $@
