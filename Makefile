# SPDX-License-Identifier: MIT
# The front door; the build itself is CMake's (CMakeLists.txt, CMakePresets.json).
# On a fresh Debian each target first installs what it misses (tools/setup.sh).

JOBS ?= $(shell nproc)
PREFIX ?= /usr/local
RANKS ?= 8

.PHONY: help demo build test test-asan test-tsan test-torch test-gpu bench lint install clean

help:
	@echo "make demo     build and run an MoE layer over $(RANKS) ranks on this machine, checked"
	@echo "make build    release build in build/release"
	@echo "make test     every test that needs no special hardware, also under sanitizers"
	@echo "make test-torch  the Python tests with torch, which it installs (gigabytes)"
	@echo "make test-gpu  tests and sanitizers on this machine's GPU (needs nvcc and MPS)"
	@echo "make bench    measured figures of this machine"
	@echo "make lint     format, static checks, house rules"
	@echo "make install  library, headers, command, man pages to PREFIX=$(PREFIX)"
	@echo "make clean    remove build/"

build:
	@tools/setup.sh build
	cmake --preset release -DEP_BUILD_TESTS=OFF
	cmake --build --preset release -j $(JOBS)

demo: build
	build/release/bin/entrepot demo --ranks $(RANKS)

test:
	@tools/setup.sh test
	@tools/python_env.sh
	tools/test.sh default asan tsan

test-asan:
	@tools/setup.sh test
	tools/test.sh asan

test-tsan:
	@tools/setup.sh test
	tools/test.sh tsan

# The Python tests once more, with torch's CPU tensors; downloads torch, some gigabytes, once.
test-torch:
	@tools/setup.sh test
	@tools/python_env.sh torch
	cmake --preset default && cmake --build --preset default -j $(JOBS) --target entrepot
	EP_LIBRARY=$(CURDIR)/build/default/lib/libentrepot.so \
	    build/python-torch/bin/python -m pytest -q -p no:cacheprovider bindings/python/tests

test-gpu:
	tools/gpu_test.sh

bench:
	@tools/setup.sh build bench
	$(MAKE) build
	tools/bench.sh

lint:
	@tools/setup.sh build lint
	tools/lint.sh

install: build
	cmake --install build/release --prefix $(PREFIX)

clean:
	rm -rf build
