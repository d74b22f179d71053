# ferry: everything a developer or a first user runs. `make demo` and `make test` need nothing done
# by hand before: both call deps and build.

PRESET ?= release
BUILD   = build/$(PRESET)
PREFIX ?= $(CURDIR)/dist
# A source with torch's headers takes about a gigabyte to compile.
JOBS   ?= $(shell awk -v n=$$(nproc) '/MemAvailable/ {m = int($$2 / 1250000); print m < 1 ? 1 : m < n ? m : n}' /proc/meminfo)
# `make install`: copy puts libtorch into the tree, none leaves it to FERRY_TORCH_DIR.
INSTALL_TORCH ?= copy
FERRY   = $(BUILD)/apps/ferry/ferry
PARITY_PYTHON = tools/parity/.venv/bin/python
SEED   ?= 1

.DEFAULT_GOAL := build
.PHONY: deps build demo test quality style fixup tidy asan tsan fuzz parity bench install check-install gpu-bundle clean

deps: ## Debian packages and the libtorch wheel (into .venv)
	@tools/deps.sh

$(BUILD)/build.ninja: | deps
	cmake --preset $(PRESET)

build: deps $(BUILD)/build.ninja ## everything, tests and examples included
	cmake --build $(BUILD) -j $(JOBS)

demo: deps $(BUILD)/build.ninja ## pictures from the small model in models/shapes, streamed
	cmake --build $(BUILD) -j $(JOBS) --target ferry_cli
	@tools/demo.sh $(FERRY)

# Without the Python environment (no room, no network) the tests of the Python package are skipped.
test: build ## all tests
	@df -Pk . | awk 'NR==2 && $$4 < 8000000 {exit 1}' && tools/parity/setup.sh || \
	  echo "test: no Python environment: the tests of the Python package will be skipped"
	cd $(BUILD) && ctest --output-on-failure

quality: deps ## format, layers, mirror of tests, models: quick
	@tools/quality.sh

style: ## formats all sources
	@tools/format.sh --all

fixup: ## formats what changed since HEAD
	@tools/format.sh --changed

tidy: $(BUILD)/build.ninja ## clang-tidy; slow: it parses torch's headers; FOLDERS="src/ferry/base" for some
	@tools/tidy.sh $(BUILD) $(FOLDERS)

asan: deps ## all tests under the address and undefined-behaviour sanitizers; slow
	cmake --preset asan
	cmake --build build/asan -j $(JOBS)
	cd build/asan && ctest --output-on-failure

# The planner's thousand random cases have one thread and take minutes here.
tsan: deps ## base, io and offload under the thread sanitizer, the fake device included; slow
	cmake --preset tsan
	cmake --build build/tsan -j $(JOBS) --target test_base test_io test_offload test_offload_accelerator
	cd build/tsan && TSAN_OPTIONS="suppressions=$(CURDIR)/tools/tsan.supp" OMP_NUM_THREADS=1 \
	  GTEST_FILTER=-PlanByTime.WithinFivePercentOfBruteForceAndNeverOverBudget \
	  ctest --output-on-failure -R '^test_(base|io|offload|offload_accelerator)$$'

fuzz: deps ## each parser of foreign bytes, five minutes (SECONDS_EACH)
	@tools/fuzz.sh $(or $(SECONDS_EACH),300)

$(PARITY_PYTHON):
	tools/parity/setup.sh

parity: build $(PARITY_PYTHON) ## fresh random models against Python diffusers; SEED=n
	$(PARITY_PYTHON) tools/parity/run.py --seed $(SEED) --ferry $(FERRY)

bench: deps ## side by side with Python diffusers and accelerate
	cmake --preset $(PRESET) -DFERRY_BUILD_BENCH=ON
	cmake --build $(BUILD) -j $(JOBS)
	bench/run.sh $(FERRY)

install: build ## a tree that can be moved: make install PREFIX=DIR
	cmake --install $(BUILD) --prefix "$(PREFIX)" >/dev/null
	@tools/collect_libs.sh "$(PREFIX)" $(if $(filter none,$(INSTALL_TORCH)),--without-torch)

check-install: build ## installs, moves the tree, runs it and builds the examples against it
	@tools/check_install.sh $(BUILD)

gpu-bundle: build ## what bench/gpu.sh needs on a machine with a GPU and its own torch
	@tools/gpu_bundle.sh $(BUILD)

clean:
	rm -rf build out dist gpu-bundle
