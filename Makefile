# Each command does all of its own set-up: a virtual environment in .venv with the pinned tools, the build,
# then the work. What is there already is not made again.

PYTHON ?= python3
BIN := .venv/bin
CPP := $(wildcard csrc/*/*.h csrc/*/*.inl csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/cpp/*.h tests/cpp/*.cpp \
	tests/cuda/*.h tests/cuda/*.cpp tests/cuda/*/*.h tests/cuda/*/*.cpp)
BUILT_FROM := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*/*)

# The tools of .venv come before those of the machine, for CMake too.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help build demo test test-cpp test-full test-reference check format gpu cuda-report bench sanitize wheel clean

help:
	@echo "make demo            train a network on real text, with and without clipping"
	@echo "make test            all tests but the slow ones, with the extension built"
	@echo "make test-cpp        those of the C++ library alone, which make test includes"
	@echo "make test-full       the slow ones too: minutes, and 8 GB of memory"
	@echo "make test-reference  the same tests on an installation without the extension"
	@echo "make check           format, lint and types"
	@echo "make format          put the format right"
	@echo "make gpu             try everything on this machine's GPU: right or wrong, and how fast"
	@echo "make bench           the benchmark of the README"
	@echo "make cuda-report     what the compiled CUDA kernels show without a GPU: registers, loads; needs nvcc"
	@echo "make sanitize        the C++ tests under the address, undefined and thread sanitizers"
	@echo "make wheel           dist/gradkern-*.whl"
	@echo "make clean           forget everything that was built, .venv included"

# A new list of tools makes a new environment, so that none is left that the list does not name.
.venv/installed: requirements-dev.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	pwd > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gradkern.pth
	touch $@

# In place, where a second build compiles only what has changed; an installation by pip starts from nothing.
# GRADKERN_BUILD=1: without its extension the package would install all the same, and these commands would
# quietly work on the reference alone.
.venv/built: .venv/installed $(BUILT_FROM)
	@echo "building the extension (about a minute the first time)"
	GRADKERN_BUILD=1 $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

build: .venv/built

demo: .venv/built
	$(BIN)/python -m gradkern.demo

test: .venv/built test-cpp
	GRADKERN_EXPECT=native $(BIN)/python -m pytest

test-full: .venv/built test-cpp
	GRADKERN_EXPECT=native $(BIN)/python -m pytest -m ""

# The torch-free library alone.
test-cpp: .venv/installed
	cmake -S . -B build/cpp -G Ninja -DGRADKERN_TESTS=ON >/dev/null
	cmake --build build/cpp
	ctest --test-dir build/cpp --output-on-failure

# Tests that compute nothing by a kernel: they are the same without the extension.
SAME_WITHOUT := tests/record tests/diagnosis tests/monitor tests/policies tests/cuda tests/test_benchmarks.py

# In a directory of its own, away from the extension that was built into gradkern/. An older build/lib would
# lend the package modules that are no longer in the sources.
test-reference: .venv/installed
	rm -rf build/reference build/lib*
	GRADKERN_BUILD=0 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --target build/reference .
	cp -R tests benchmarks conftest.py pyproject.toml build/reference
	cd build/reference && GRADKERN_EXPECT=reference python -m pytest -m "not slow and not packaging" \
	  $(addprefix --ignore=,$(SAME_WITHOUT))

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

gpu: .venv/built
	$(BIN)/python -m gradkern.selftest

bench: .venv/built
	$(BIN)/python -m benchmarks

cuda-report: .venv/installed
	$(BIN)/python -m tests.cuda.report

sanitize: .venv/installed
	for sanitizer in address,undefined thread; do \
	  echo "== $$sanitizer"; \
	  cmake -S . -B build/sanitize-$$sanitizer -G Ninja -DGRADKERN_TESTS=ON -DGRADKERN_SANITIZE=$$sanitizer >/dev/null && \
	  cmake --build build/sanitize-$$sanitizer && \
	  ctest --test-dir build/sanitize-$$sanitizer --output-on-failure || exit 1; \
	done

wheel: .venv/installed
	rm -rf build/lib*
	rm -rf dist
	GRADKERN_BUILD=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist
	@$(BIN)/python -c "import glob, zipfile; print(zipfile.ZipFile(glob.glob('dist/*.whl')[0]).read('gradkern/_build.json').decode())"

clean:
	rm -rf .venv build dist *.egg-info gradkern/_C.*.so gradkern/_build.json
