#!/usr/bin/env bash
# compute-sanitizer (memcheck, initcheck, synccheck) over every CUDA kernel on small problems: tests/cpp/cuda_driver.cpp,
# linked to the objects of the last `make build`. No PyTorch in the process, which keeps it under three minutes.
#
#   bash tools/compute_sanitizer.sh [--build-only] [KERNEL...]
#
# FLASH_ATTN_EXT_BUILD_DIR (default build/objects), CUDA_HOME, CXX, COMPUTE_SANITIZER and TOOLS are optional.
set -euo pipefail
cd "$(dirname "$0")/.."

cuda=${CUDA_HOME:-/usr/local/cuda}
objects=${FLASH_ATTN_EXT_BUILD_DIR:-build/objects}
driver=build/cuda_driver
build_only=false
if [ "${1:-}" = --build-only ]; then
  build_only=true
  shift
fi

if [ ! -x "$driver" ] || [ -n "$(find csrc/cuda csrc/core tests/cpp/cuda_driver.cpp -newer "$driver" -type f)" ]; then
  shopt -s nullglob
  parts=("$objects"/csrc/cuda/registry.o "$objects"/csrc/cuda/instances/*.o)
  if [ ${#parts[@]} -lt 3 ]; then
    echo "compute_sanitizer: no objects of a CUDA build below $objects; call make build first" >&2
    exit 1
  fi
  mkdir -p "$(dirname "$driver")"
  "${CXX:-g++}" -std=c++17 -O2 -Wall -I csrc -I "$cuda/include" tests/cpp/cuda_driver.cpp "${parts[@]}" \
    -L "$cuda/lib64" -Wl,-rpath,"$cuda/lib64" -lcudart -lpthread -ldl -o "$driver"
fi
$build_only && exit 0

sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo "$cuda/bin/compute-sanitizer")}
if ! command -v "$sanitizer" >/dev/null; then
  echo "compute_sanitizer: no compute-sanitizer; it is part of the CUDA toolkit (apt-get install cuda-sanitizer-13-0)" >&2
  exit 1
fi
"$driver" "$@"
for tool in ${TOOLS:-memcheck initcheck synccheck}; do
  echo "== $tool"
  "$sanitizer" --tool "$tool" --error-exitcode 99 --print-limit 20 "$driver" "$@"
done
echo "compute_sanitizer: found nothing"
