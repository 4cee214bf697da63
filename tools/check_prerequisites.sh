#!/bin/sh
# Names what a bare machine lacks, with the line that installs it. Exit status 1 if something needed is missing.
python=${1:-python3}
missing=""
say() { printf '%s\n' "$1" >&2; }
need() { missing="$missing $2"; say "missing: $1"; }

if ! command -v "$python" >/dev/null 2>&1; then
  need "$python (3.10 or newer)" python3
  missing="$missing python3-dev python3-venv"
else
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { say "$python is $("$python" -V 2>&1 | cut -d' ' -f2), and 3.10 or newer is needed: call make PYTHON=python3.12"; exit 1; }
  "$python" -c 'import venv, ensurepip' 2>/dev/null || need "python's venv and pip" "python3-venv python3-pip"
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [ -f "$header" ] || need "Python.h" python3-dev
fi
command -v g++ >/dev/null 2>&1 || command -v c++ >/dev/null 2>&1 || need "a C++ compiler" g++
command -v make >/dev/null 2>&1 || need make make

if [ -n "$missing" ]; then
  say "Install what is missing, then call make again:"
  say "    apt-get install -y$missing"
  exit 1
fi
command -v nvcc >/dev/null 2>&1 || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
  say "note: no nvcc was found; this will be a CPU build"
exit 0
