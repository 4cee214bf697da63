#!/usr/bin/env bash
# AddressSanitizer and UBSan over the CPU engine: builds csrc/cpu and tests/cpp/engine_driver.cpp with both, linked to
# the PyTorch of the `python` on the path, and runs the driver. PyTorch itself is not instrumented.
#
#   PYTHON=python3.12 CXX=g++ CXXSTD=c++17 bash tools/sanitize.sh      (all optional)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
command -v "$python" >/dev/null || python=python3
cxx=${CXX:-g++}
build=build/sanitize
mkdir -p "$build"

# shellcheck disable=SC2054  # the comma is part of the flag
flags=(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
if ! echo 'int main() {}' | "$cxx" -x c++ "${flags[@]}" - -o "$build/probe" 2>"$build/probe.log"; then
  cat "$build/probe.log" >&2
  echo "sanitize: $cxx has no libasan or libubsan. With GCC on Debian or Ubuntu they come with the compiler:" >&2
  echo "    apt-get install g++        (or libasan8 libubsan1, or CXX=clang++ bash tools/sanitize.sh)" >&2
  exit 1
fi

# Where this PyTorch lives and which C++ ABI it has.
query='import pathlib, torch; print(int(torch._C._GLIBCXX_USE_CXX11_ABI), pathlib.Path(torch.__file__).parent)'
read -r abi torch < <("$python" -c "$query") || true
if [ -z "${torch:-}" ]; then
  echo "sanitize: '$python' has no PyTorch; set PYTHON to one that has" >&2
  exit 1
fi

# -O1: the vector code of the tile operations is too slow without it.
compile=("$cxx" "-std=${CXXSTD:-c++17}" -O1 -g1 -fopenmp -Wall -Wno-psabi "${flags[@]}" "-D_GLIBCXX_USE_CXX11_ABI=$abi"
  -Icsrc -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" -MMD -MP)

# One make rule per object, so that a second run compiles what changed.
sources=(csrc/cpu/*.cpp tests/cpp/engine_driver.cpp)
objects=()
{
  for source in "${sources[@]}"; do
    object=$build/$(basename "$source" .cpp).o
    objects+=("$object")
    printf '%s: %s tools/sanitize.sh\n\t%s -c $< -o $@\n' "$object" "$source" "${compile[*]}"
  done
  # libtorch_cpu of a CUDA build needs CUDA libraries, which it finds itself when it is loaded.
  printf '%s: %s\n\t%s\n' "$build/engine_driver" "${objects[*]}" \
    "$cxx ${flags[*]} -fopenmp $^ -o \$@ -L$torch/lib -Wl,-rpath,$torch/lib -Wl,--unresolved-symbols=ignore-in-shared-libs -ltorch_cpu -lc10"
  printf -- '-include %s/*.d\n' "$build"
} >"$build/Makefile"
make --no-print-directory -s -j"$(nproc)" -f "$build/Makefile" "$build/engine_driver"

# detect_leaks=0: libtorch keeps registries and oneDNN's generated kernels until the process ends, by design.
# detect_odr_violation=0: globals of libtorch that the engine's inline functions share with it.
export ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0:strict_string_checks=1:abort_on_error=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export UBSAN_OPTIONS="print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"
"$build/engine_driver"
# The same without AVX-512: other tile operations, and bf16 converted to fp32 operands.
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 "$build/engine_driver"
echo "sanitize: AddressSanitizer and UBSan found nothing"
