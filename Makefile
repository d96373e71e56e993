# make demo, make test: each sets up all that it needs in .venv, and a second call is quick.
#   PYTHON       the Python that .venv is made with, 3.11 or later
#   KERNELS      whose nvcc builds the kernels: nvcc (this machine's), pypi (installed in build/),
#                off (no kernels), auto (nvcc; or pypi beside a GPU that can run it; or off)
#   JOBS         how many tests run at once
#   DEMO_ARGS, PYTEST_ARGS, CMAKE_ARGS   passed on
PYTHON ?= python3
KERNELS ?= auto
# JAX compiles on one core, so two at a time pay; one GPU is not shared.
JOBS ?= $(if $(DRIVER),0,2)
comma := ,

# The major version of the GPU's driver, empty where there is no GPU. CUDA 13 needs 580.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
            | head -n 1 | grep -o '^[0-9]*')
CUDA13 := $(shell test 0$(DRIVER) -ge 580 && echo yes)
GPU_EXTRA := $(if $(DRIVER),$(if $(CUDA13),$(comma)cuda13,$(comma)cuda12))

NVCC := $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
MODE := $(KERNELS)
ifeq ($(MODE),auto)
  MODE := $(if $(NVCC),nvcc,$(if $(CUDA13),pypi,off))
endif
ifeq ($(MODE),pypi)
  NVCC := $(CURDIR)/build/nvcc/nvidia/cu13/bin/nvcc
endif

LIBRARY := build/kernels/libgenie_kernels.so
MODULE := pyproject.toml CMakeLists.txt csrc/bindings.cpp csrc/targets.h build/.mode-$(MODE)
ifeq ($(MODE),off)
  DEFINE := GENIE_CUDA=OFF
else
  DEFINE := GENIE_KERNELS=$(CURDIR)/$(LIBRARY)
  MODULE += $(LIBRARY)
  export GENIE_EXPECT_KERNELS := 1
endif
CMAKE := PATH="$(CURDIR)/.venv/bin:$$PATH" cmake
INSTALL := pip install -q --no-build-isolation -C cmake.define.$(DEFINE)

# What pyproject.toml builds with: the tools, and jax at the floor, whose headers we compile with.
requires = $(shell $(PYTHON) -c 'import shlex, tomllib; \
  requires = tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]; \
  print(*(shlex.quote(r) for r in requires if r.startswith("$(1)") == $(2)))')
TOOLS = $(call requires,jax,False) cmake ninja
FLOOR = $(call requires,jax,True) flax==0.12.0
PYTEST = -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

.PHONY: demo test test-floor lint kernels carry clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	.venv/bin/genie-tk-jax demo $(DEMO_ARGS)

test: lint
	.venv/bin/pytest $(PYTEST)

test-floor: .venv-floor/.test
	.venv-floor/bin/pytest $(PYTEST)

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs .venv/bin/clang-format --dry-run --Werror
	.venv/bin/basedpyright --pythonpath .venv/bin/python

kernels: $(LIBRARY)

# All that tests/gpu/remote.sh takes to a machine with a GPU, beside the sources.
carry: $(LIBRARY)
	$(CMAKE) --build build/kernels --target harness
	rm -rf build/carry && mkdir -p build/carry
	cp -r $(LIBRARY) build/kernels/harness build/carry

clean:
	rm -rf build .venv .venv-floor

.venv/.python .venv-floor/.python: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON must be 3.11 or later")'
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install -q $(TOOLS)
	touch $@

.venv/.demo: .venv/.python $(MODULE)
	.venv/bin/$(INSTALL) -e '.[demo$(GPU_EXTRA)]'
	touch $@

.venv/.test: .venv/.python $(MODULE)
	.venv/bin/$(INSTALL) -e '.[test$(GPU_EXTRA)]'
	touch $@

# Not editable: here the tests run on what a wheel holds.
.venv-floor/.test: .venv-floor/.python $(MODULE) $(shell find genie_tk_jax -type f -not -name '*.pyc')
	.venv-floor/bin/$(INSTALL) '.[train,convert,haiku]' $(FLOOR) pytest pytest-xdist
	touch $@

build/.mode-$(MODE):
	rm -f build/.mode-*
	mkdir -p build && touch $@

$(LIBRARY): CMakeLists.txt $(shell find csrc -type f) build/xla/.done \
            $(if $(filter pypi,$(MODE)),$(NVCC)) | .venv/.python
	$(CMAKE) -S . -B $(@D) -G Ninja -DGENIE_CUDA=ON -DCMAKE_CUDA_COMPILER='$(NVCC)' \
	  -DXLA_FFI_INCLUDE_DIR=$(CURDIR)/build/xla -DGENIE_PYTHON=OFF $(CMAKE_ARGS)
	$(CMAKE) --build $(@D)
	touch -c $@

build/xla/.done: pyproject.toml | .venv/.python
	rm -rf build/xla build/jaxlib
	.venv/bin/pip install -q --no-deps --target build/jaxlib $(filter jaxlib%,$(call requires,jax,True))
	mv build/jaxlib/jaxlib/include build/xla
	rm -rf build/jaxlib
	touch $@

# The packages lack two names that nvcc and CMake look for.
$(CURDIR)/build/nvcc/nvidia/cu13/bin/nvcc: | .venv/.python
	.venv/bin/pip install -q --target build/nvcc nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.* \
	  nvidia-cuda-crt==13.0.* nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.*
	cd build/nvcc/nvidia/cu13 && ln -sfn lib lib64 && ln -sf libcudart.so.13 lib/libcudart.so
