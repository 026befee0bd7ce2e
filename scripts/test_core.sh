#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds and runs tests/core, the C++ tests of every kernel on every instruction set. Warnings are errors.
#
#   scripts/test_core.sh plain [WORD]     as it is released; WORD chooses tests by name
#   scripts/test_core.sh address [WORD]   under AddressSanitizer and UndefinedBehaviorSanitizer
#   scripts/test_core.sh thread [WORD]    under ThreadSanitizer, this machine's instruction set
#   scripts/test_core.sh aarch64 [WORD]   compiled for aarch64, under emulation
#   scripts/test_core.sh ops [ARGS]       not these but tests/ops, with a module built as for `address`; ARGS for pytest
set -eu
cd "$(dirname "$0")/.."
kind=${1:-plain}
[ $# -eq 0 ] || shift
build=build/core-$kind
run=

fail() {
    printf 'test_core.sh: %s\n' "$*" >&2
    exit 1
}

need() { # program, package
    command -v "$1" >/dev/null || fail "expected $1 to test the core ($kind), got no such program; apt-get install $2"
}

PATH=$PWD/.venv/bin:$PATH
need cmake cmake
options="-DFVM_CORE_TESTS=ON -DFVM_WERROR=ON"
case $kind in
plain) ;;
address | ops) options="$options -DFVM_SANITIZE=address,undefined" build=build/core-address ;;
thread) options="$options -DFVM_SANITIZE=thread -DFVM_ISA_BUILD=native" ;;
aarch64)
    need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
    need qemu-aarch64 qemu-user
    run=qemu-aarch64
    options="$options -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64"
    options="$options -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"
    ;;
*) fail "expected plain, address, thread, aarch64 or ops, got '$kind'" ;;
esac
case $kind in # with the Python module, or without
plain | address | ops)
    options="$options -DPython_EXECUTABLE=$(command -v python) -Dpybind11_DIR=$(python -m pybind11 --cmakedir)" ;;
*) options="$options -DFVM_BINDINGS=OFF" ;;
esac
! command -v ninja >/dev/null || options="$options -G Ninja"

mkdir -p build
# shellcheck disable=SC2086 # options are words
cmake -S . -B "$build" $options >"$build.log" || { cat "$build.log" && fail "cmake could not configure $build"; }
cmake --build "$build" --parallel "$(getconf _NPROCESSORS_ONLN)"
# Threads that wait by spinning take the processors from those that work, where these are few.
export OMP_WAIT_POLICY=passive
if [ "$kind" != ops ]; then
    exec $run "$build/tests/core/core_tests" "$@"
fi

# The package as it is, but for the module: the sanitizer's library comes first into a Python that is not built with it.
package=$PWD/$build/package
rm -rf "$package" && mkdir -p "$package/fvm_fast"
for entry in fvm_fast/*; do
    case $entry in */_C*) ;; *) ln -s "$PWD/$entry" "$package/fvm_fast/" ;; esac
done
ln -s "$PWD/$build"/_C.*.so "$package/fvm_fast/"
export LD_PRELOAD="$(c++ -print-file-name=libasan.so):$(c++ -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$package" PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1
tested=$(cd "$package" && python -c 'from fvm_fast.ops._backend import _C; print(_C.__file__)')
case $tested in
"$package"/*) exec pytest -p no:cacheprovider "$@" ;;
*) fail "expected the module of $package to be tested, got $tested" ;;
esac
