#!/bin/sh
# ruff over the Python, clang-format over the C++ and CUDA sources, the include rules. --fix rewrites instead of
# complaining. The tools are the pinned ones of the `lint` extra: pip install -e '.[lint]'.
set -u
cd "$(dirname "$0")/.." || exit 1

fix=false
case ${1:-} in
  --fix) fix=true ;;
  "") ;;
  *) echo "usage: tools/lint.sh [--fix]" >&2; exit 2 ;;
esac

for tool in ruff clang-format; do
  command -v "$tool" >/dev/null 2>&1 ||
    { echo "lint: no $tool on the path; pip install -e '.[lint]' installs the pinned one" >&2; exit 2; }
done
# Another clang-format breaks lines elsewhere, and would have everybody undo everybody's formatting.
wanted=$(sed -n 's/.*"clang-format==\([0-9.]*\)".*/\1/p' pyproject.toml)
case $(clang-format --version) in
  *"version ${wanted:-14.}"*) ;;
  *) echo "lint: $(command -v clang-format) is '$(clang-format --version)', wanted ${wanted:-14}" >&2; exit 2 ;;
esac

# What git tracks or would track: no build output, no environment.
sources() { git ls-files --cached --others --exclude-standard -- "$@" | while read -r f; do test -f "$f" && echo "$f"; done; }
cxx=$(sources '*.h' '*.cpp' '*.cu' '*.cuh')
status=0
# Paths in this repository have no blanks, so a list of them may be split into words.
# shellcheck disable=SC2086
if $fix; then
  ruff check --fix --quiet . || status=1
  ruff format --quiet . || status=1
  clang-format -i $cxx || status=1
else
  ruff check . || status=1
  ruff format --check . || status=1
  clang-format --dry-run -Werror $cxx || status=1
fi

if [ -f tests/test_architecture.py ]; then
  python -m pytest -q -p no:cacheprovider tests/test_architecture.py || status=1
fi

[ $status = 0 ] && echo "lint: clean"
exit $status
