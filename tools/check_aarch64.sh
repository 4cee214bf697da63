#!/bin/sh
# Compiles csrc/core and csrc/cpu for aarch64 with a cross-compiler, without linking: what a change for x86 breaks there
# shows up here. ATen's headers are the same on both; the x86 intrinsics among them are behind the compiler's macros.
# With qemu-user-static the tile operations' test runs as well, on this machine.
#
#   apt-get install g++-aarch64-linux-gnu [qemu-user-static libgtest-dev]
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
cxx=${CXX:-aarch64-linux-gnu-g++}
build=build/aarch64
command -v "$python" >/dev/null || python=python3
command -v "$cxx" >/dev/null || { echo "check_aarch64: apt-get install g++-aarch64-linux-gnu" >&2; exit 1; }
torch=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')
mkdir -p "$build"

for header in csrc/core/*.h; do
  echo "#include \"core/$(basename "$header")\"" |
    "$cxx" -std=c++17 -Wall -Wextra -Werror -Icsrc -fsyntax-only -x c++ -
done
# Code is generated, not only parsed: templates and always_inline functions fail late. The tile operations need no torch.
for source in csrc/cpu/*.cpp; do
  case $source in
    *tile_ops*) include= ;;
    *) include="-isystem $torch/include" ;;
  esac
  # shellcheck disable=SC2086
  "$cxx" -std=c++17 -O2 -fopenmp -Wall -Werror -Wno-psabi $include -c "$source" -o "$build/$(basename "$source" .cpp).o"
done
echo "check_aarch64: csrc/core and csrc/cpu compile"

# The test needs GoogleTest for aarch64: its sources come with libgtest-dev.
gtest=/usr/src/googletest/googletest
if ! command -v qemu-aarch64-static >/dev/null || [ ! -d "$gtest" ]; then
  echo "check_aarch64: not run (apt-get install qemu-user-static libgtest-dev runs the tile operations' test, too)"
  exit 0
fi
for source in "$gtest/src/gtest-all.cc" "$gtest/src/gtest_main.cc"; do
  object=$build/$(basename "$source" .cc).o
  [ -f "$object" ] || "$cxx" -std=c++17 -O1 -w "-I$gtest" "-I$gtest/include" -c "$source" -o "$object"
done
"$cxx" -std=c++17 -O1 -Icsrc "-I$gtest/include" -Wno-psabi tests/cpp/test_tile_ops.cpp "$build"/tile_ops*.o \
  "$build/gtest-all.o" "$build/gtest_main.o" -pthread -o "$build/test_tile_ops"
qemu-aarch64-static -L /usr/aarch64-linux-gnu "$build/test_tile_ops" --gtest_brief=1
