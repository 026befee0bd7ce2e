# SPDX-License-Identifier: Apache-2.0
# make demo | test | test-min-torch | test-gpu | bench | build | format, and, of the core, test-core | test-aarch64 | sanitize.
# Each sets up what it needs, once: .venv, requirements, core.
# PYTHON=python3.12 chooses the interpreter; ARGS="..." goes to the program that is run.
PYTHON ?= python3
MIN_TORCH = torch==2.13.0
# Of the op tests those that reach the kernels in this process: the others tell a sanitizer nothing, and take as long.
SANITIZED_TESTS = tests/ops -q -k "not (memory or joined or environment or ring or compile or opcheck)"
BIN = .venv/bin
CORE_SOURCES = setup.py CMakeLists.txt $(wildcard csrc/* cuda/*)
export PYTHON

.PHONY: demo test test-min-torch test-gpu test-core test-aarch64 sanitize bench build format
.NOTPARALLEL:

demo: .venv/demo.stamp .venv/core.stamp
	$(BIN)/fvm-fast train --config clip_emoji $(ARGS)

test: .venv/dev.stamp .venv/core.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

test-min-torch: .venv-min/ready.stamp .venv/core.stamp
	PYTHONPATH=. .venv-min/bin/python -m pytest tests/ops $(ARGS)

# What only a GPU can tell of the CUDA kernels; scripts/test_gpu.py says what.
test-gpu: .venv/dev.stamp .venv/core.stamp
	$(BIN)/python scripts/test_gpu.py $(ARGS)

# The compiled core without Python: every kernel on every instruction set, on aarch64, under the sanitizers.
test-core: .venv/dev.stamp
	scripts/test_core.sh plain $(ARGS)

test-aarch64:
	scripts/test_core.sh aarch64 $(ARGS)

# And the ops under them: what threads, ids at the edge, empty and strided tensors make the kernels do.
sanitize: .venv/dev.stamp
	scripts/test_core.sh address
	scripts/test_core.sh thread
	scripts/test_core.sh ops $(SANITIZED_TESTS)

bench: .venv/dev.stamp .venv/core.stamp
	set -e; for script in benchmarks/bench_*.py; do $(BIN)/python $$script $(ARGS); done

build: .venv/demo.stamp
	$(BIN)/python setup.py build_ext --inplace
	touch .venv/core.stamp

format: .venv/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(wildcard $(foreach folder,csrc cuda tests/core benchmarks/engine,$(addprefix $(folder)/,*.h *.cpp *.cuh *.cu)))

# ---- set-up: a stamp is older than what it was made from only if something must be done again

.venv/demo.stamp: pyproject.toml install.sh
	./install.sh
	touch $@ .venv/core.stamp

.venv/dev.stamp: pyproject.toml install.sh
	./install.sh dev
	touch $@ .venv/demo.stamp .venv/core.stamp

.venv/core.stamp: $(CORE_SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

.venv-min/ready.stamp: .venv/demo.stamp Makefile
	$(BIN)/python -m venv --clear .venv-min
	.venv-min/bin/python -m pip install --disable-pip-version-check --quiet $(MIN_TORCH) numpy Pillow safetensors tokenizers pytest
	touch $@
