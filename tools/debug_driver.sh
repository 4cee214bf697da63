#!/usr/bin/env bash
# Hopper's kernels in a debug build, in the driver of tests/cpp/; all other objects come from the last `make build`.
#
#   bash tools/debug_driver.sh delays       build/cuda_driver_delays: random delays at every barrier (FAE_DEBUG_DELAYS)
#   bash tools/debug_driver.sh barriers     build/cuda_driver_barriers: a wait of seconds names its barrier and traps
#                                           (FAE_DEBUG_BARRIERS). Two builds, since its printf serialises all wgmma.
#
# Run them with --many 20.
#
# FLASH_ATTN_EXT_BUILD_DIR (default build/objects), CUDA_HOME, CXX, NVCC and JOBS are optional.
set -euo pipefail
cd "$(dirname "$0")/.."

cuda=${CUDA_HOME:-/usr/local/cuda}
nvcc=${NVCC:-$(command -v nvcc || echo "$cuda/bin/nvcc")}
objects=${FLASH_ATTN_EXT_BUILD_DIR:-build/objects}
case "${1:-}" in
  delays) macro=FAE_DEBUG_DELAYS ;;
  barriers) macro=FAE_DEBUG_BARRIERS ;;
  *) sed -n '2,/^set/p' "$0" | grep '^#' >&2 && exit 2 ;;
esac
folder=build/debug/$1
shopt -s nullglob
parts=("$objects"/csrc/cuda/registry.o)
for object in "$objects"/csrc/cuda/instances/*.o; do
  case "$object" in */sm90_*) ;; *) parts+=("$object") ;; esac
done
if [ ${#parts[@]} -lt 3 ]; then
  echo "debug_driver: no objects of a CUDA build below $objects; call make build first" >&2
  exit 1
fi
mkdir -p "$folder"
flags="-std=c++17 -O3 --expt-relaxed-constexpr -D$macro"
flags="$flags -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__"
flags="$flags -gencode arch=compute_90a,code=sm_90a"
compile() {
  [ ! -e "$2" ] || [ -n "$(find csrc/cuda csrc/core -newer "$2" -type f -print -quit)" ] || return 0
  # shellcheck disable=SC2086
  "$nvcc" $flags -c "$1" -o "$2"
}
export -f compile
export nvcc flags
for source in csrc/cuda/instances/sm90_*.cu; do
  printf '%s\0%s\0' "$source" "$folder/$(basename "$source" .cu).o"
done | xargs -0 -n 2 -P "${JOBS:-$(nproc)}" bash -c 'compile "$0" "$1"'
"${CXX:-g++}" -std=c++17 -O2 -Wall -I csrc -I "$cuda/include" tests/cpp/cuda_driver.cpp "${parts[@]}" "$folder"/sm90_*.o \
  -L "$cuda/lib64" -Wl,-rpath,"$cuda/lib64" -lcudart -lpthread -ldl -o build/cuda_driver_$1
