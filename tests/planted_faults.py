"""Small faults, planted into a copy of the engine, each of which the test suite has to catch.

    python tests/planted_faults.py                              all of them, a table on the console
    python tests/planted_faults.py --write docs/planted-faults.md
    python tests/planted_faults.py --only no-rescale-of-o gqa-head

The copy is built once, with every fault behind a switch that an environment variable throws. The suite runs once with
each fault, where it has to fail, up to the first test that does. Those tests then run with no fault, where they have to
pass: it was the fault that they saw, and not the copy. Exit status 1 where a fault survives or the control fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "planted"
SWITCH = "FLASH_ATTN_EXT_PLANTED_FAULT"
# What is run, a fault's nearest file first, until the first failure.
SUITE = ["test_forward.py", "test_backward.py", "test_errors.py", "test_ops.py", "test_determinism.py"]
DIED = "(the process ended with status"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


@dataclass(frozen=True)
class Fault:
    name: str
    file: str  # below csrc/
    sound: str  # what stands there, exactly once
    faulty: str  # what the copy has instead; FAULT is true where this fault is thrown
    meaning: str
    nearest: str = SUITE[0]  # of SUITE or in it, run first; the order saves minutes and decides nothing


FAULTS = [
    Fault(
        "no-rescale-of-o", "cpu/forward_v2.cpp", "if (rescale && has_started(m0))",
        "if (!FAULT && rescale && has_started(m0))", "version 2 keeps O as it was when a row's maximum rises",
    ),
    Fault(
        "no-rescale-of-l", "cpu/tile_ops_impl.h", "load_as<Acc>(l + r0, n) * factor + sums",
        "load_as<Acc>(l + r0, n) * (FAULT ? broadcast(Acc(1)) : factor) + sums",
        "the row sum is not rescaled when the maximum rises",
    ),
    Fault(
        "v1-keeps-old-weight", "cpu/forward_v1.cpp", "scratch.o_keep[r] = keep * inverse;",
        "scratch.o_keep[r] = FAULT ? l_i[r] * inverse : keep * inverse;",
        "version 1 weighs the old O without exp(m_i - m_new) (Algorithm 1, line 12)",
        nearest="test_forward.py::test_v1",
    ),
    Fault(
        "causal-off-by-one", "core/mask.h", "clamp_distance(int64_t{shift} + spec.window_right + 1)",
        "clamp_distance(int64_t{shift} + spec.window_right + (FAULT ? 0 : 1))",
        "a causal row does not see the key on the diagonal",
    ),
    Fault(
        "window-off-by-one", "core/mask.h", "clamp_distance(int64_t{shift} - spec.window_left)",
        "clamp_distance(int64_t{shift} - spec.window_left + (FAULT ? 1 : 0))",
        "a window lacks its leftmost key",
    ),
    Fault(
        "alignment-ignored", "core/mask.h", "spec.top_left ? 0 : seqlen_k - seqlen_q",
        "spec.top_left && !FAULT ? 0 : seqlen_k - seqlen_q", "top-left masks are aligned bottom-right",
    ),
    Fault(
        "rows-of-keys", "core/mask.h", "const int first = n0 - hi + 1, last = n1 - lo;",
        "const int first = n0 - hi + (FAULT ? 2 : 1), last = n1 - lo;",
        "the backward skips the first row that sees a block of keys",
        nearest="test_backward.py",
    ),
    Fault(
        "gqa-head", "core/params.h", "return h / heads_per_kv();", "return FAULT ? h % heads_kv : h / heads_per_kv();",
        "query heads are dealt to key/value heads in turn, not in groups",
    ),
    Fault(
        "lse-in-base-2", "core/softmax.h", "m_i * T(kLn2) + log_of(l_i)",
        "(FAULT ? m_i + log_of(l_i) / T(kLn2) : m_i * T(kLn2) + log_of(l_i))", "lse comes out in base 2",
    ),
    Fault(
        "empty-row", "core/softmax.h", "return l_i == T(0) ? T(0) : T(1) / l_i;",
        "return l_i == T(0) && !FAULT ? T(0) : T(1) / l_i;", "a row that sees no key is 0 / 0",
    ),
    Fault(
        "tail-read-past-the-end", "cpu/forward_tile.h", "std::min(keys.end, seqlen_k) - keys.begin;",
        "std::min(keys.end, FAULT ? keys.end : seqlen_k) - keys.begin;",
        "the last block of keys reads rows behind the end of K and V",
    ),
    Fault(
        "dlse-ignored", "cpu/backward_v2.cpp", "delta[r] -= dlse[r];", "delta[r] -= FAULT ? Acc(0) : dlse[r];",
        "the gradient of lse is dropped",
        nearest="test_backward.py",
    ),
    Fault(
        "dk-without-scale", "cpu/backward_v2.cpp", "z.head_dim, nullptr, static_cast<Acc>(bp.fwd.scale),",
        "z.head_dim, nullptr, FAULT ? Acc(1) : static_cast<Acc>(bp.fwd.scale),", "dK lacks the factor scale",
        nearest="test_backward.py",
    ),
    Fault(
        "group-lost", "cpu/backward_v2.cpp", "const int h = h_kv * grid.group + r / grid.row_chunks;",
        "const int h = h_kv * grid.group + (FAULT ? 0 : r / grid.row_chunks);",
        "all query heads of a group take the first one's Q and dO",
        nearest="test_backward.py",
    ),
    Fault(
        "contract-hole", "ops/contract.cpp", "TORCH_CHECK_VALUE(hq % hk == 0, name,",
        "TORCH_CHECK_VALUE(FAULT || hq % hk == 0, name,", "heads that do not divide are let through",
        nearest="test_errors.py",
    ),
    Fault(
        "layout-of-q-ignored", "ops/contract.cpp", "Tensor out = at::empty_like(q);",
        "Tensor out = FAULT ? at::empty_symint(q.sym_sizes(), q.options()) : at::empty_like(q);",
        "out is contiguous whatever the layout of q",
    ),
]  # fmt: skip

SWITCH_HEADER = f"""
// Planted by tests/planted_faults.py.
namespace fae {{
extern int planted_fault;  // number of the fault, from {SWITCH}
}}
"""
SWITCH_SOURCE = f"""#include <cstdlib>

#include "platform.h"

namespace fae {{
int planted_fault = std::getenv("{SWITCH}") == nullptr ? -1 : std::atoi(std::getenv("{SWITCH}"));
}}
"""


def check_that_all_apply() -> None:
    """Each sound text stands exactly once in its file; ValueError names the one that does not."""
    for fault in FAULTS:
        count = (ROOT / "csrc" / fault.file).read_text().count(fault.sound)
        if count != 1 or "FAULT" not in fault.faulty:
            raise ValueError(
                f"{fault.name}: {count} places in csrc/{fault.file} read {fault.sound!r}; it has to be one"
            )


def make_copy() -> None:
    """The package with all switches, built for the CPU. Objects stay, so that a second run compiles what changed."""
    check_that_all_apply()
    COPY.mkdir(parents=True, exist_ok=True)
    for folder in ("csrc", "flash_attn_ext", "tests"):
        shutil.rmtree(COPY / folder, ignore_errors=True)
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "build.json")
        shutil.copytree(ROOT / folder, COPY / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / file, COPY / file)
    for number, fault in enumerate(FAULTS):
        path = COPY / "csrc" / fault.file
        switched = fault.faulty.replace("FAULT", f"(fae::planted_fault == {number})")
        path.write_text(path.read_text().replace(fault.sound, switched))
    platform = COPY / "csrc" / "core" / "platform.h"
    platform.write_text(platform.read_text() + SWITCH_HEADER)
    (COPY / "csrc" / "core" / "planted.cpp").write_text(SWITCH_SOURCE)
    environment = os.environ | {"FLASH_ATTN_EXT_CUDA": "0", "FLASH_ATTN_EXT_BUILD_DIR": str(COPY / "objects")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"the copy does not build\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")


def first_failure(number: int, tests: list[str]) -> tuple[str | None, float]:
    """The tests with one fault thrown (-1: none): the first that fails, or None; and the seconds it took."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "--no-header",
               *(f"tests/{name}" for name in tests)]  # fmt: skip
    environment = os.environ | {SWITCH: str(number), "PYTHONPATH": str(COPY)}
    done = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode == 0:
        return None, seconds
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    # A process that died says no test's name; that is caught too, if not kindly.
    return failed[1] if failed else f"{DIED} {done.returncode})", seconds


def table(caught: dict[str, str]) -> str:
    lines = ["| fault | where | what goes wrong | first test that fails |", "| --- | --- | --- | --- |"]
    for fault in FAULTS:
        test = re.sub(r"\[.*", "", caught[fault.name])
        lines.append(f"| {fault.name} | `csrc/{fault.file}` | {fault.meaning} | `{test}` |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[f.name for f in FAULTS], metavar="NAME", help="plant these alone")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table into this page")
    options = parser.parse_args()
    if options.only and options.write:
        parser.error("--write needs all faults; leave out --only")

    make_copy()
    caught: dict[str, str] = {}
    survivors = []
    for number, fault in enumerate(FAULTS):
        if options.only and fault.name not in options.only:
            continue
        failed, seconds = first_failure(number, [fault.nearest])
        if failed is None:
            failed, seconds = first_failure(number, SUITE)
        print(f"{fault.name}: {failed or 'NOT CAUGHT'} ({seconds:.0f} s)", flush=True)
        if failed is None:
            survivors.append(fault.name)
        else:
            caught[fault.name] = failed
    if survivors:
        sys.exit(f"not caught: {', '.join(survivors)}")
    named = [test for test in dict.fromkeys(caught.values()) if not test.startswith(DIED)]
    # Where a process died, nobody knows which test saw the fault: then all of them are the control.
    failed, seconds = first_failure(-1, named if len(named) == len(set(caught.values())) else SUITE)
    if failed is not None:
        sys.exit(f"fails with no fault planted, too: {failed}")
    print(f"no fault: the {len(named)} tests that failed pass ({seconds:.0f} s)", flush=True)
    if options.write:
        head, _, rest = options.write.read_text().partition(BEGIN)
        options.write.write_text(f"{head}{BEGIN}\n{table(caught)}\n{END}{rest.partition(END)[2]}")
    print(f"planted faults: all {len(caught)} caught")
    return 0


if __name__ == "__main__":
    sys.exit(main())
