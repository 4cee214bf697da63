"""Writes wgmma.cuh: one function for each form of wgmma.mma_async that the kernels use.

    python csrc/cuda/ptx/wgmma_forms.py            writes the file beside it
    python csrc/cuda/ptx/wgmma_forms.py --check    exit status 1 where it is not what it would write

The instruction names every accumulator register, so a form for each width is text that nobody should type. A new width
is one number in WIDTHS.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 256)  # N of m64nNk16
HEAD = """\
// Written by wgmma_forms.py: do not edit.
// wgmma.mma_async m64nNk16, PTX ISA 9.7.15.5; sm_90a. D[64][N] (+)= A[64][16] B[16][N], fp32 accumulators. The
// accumulator's extent picks N: d[i] are, of columns 8 i + 2 (lane % 4) and the next, row lane / 4 (elements 0, 1) and
// row lane / 4 + 8 (2, 3) of the warp's 16 rows. `accumulate` 0: D = A B. B, and A in shared memory, are given by
// descriptors (tile/wgmma_tile.cuh); transpose 1: the operand is stored with its M or N dimension contiguous.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../../core/platform.h"

// clang-format off
namespace fae::ptx {
"""
TAIL = """
}  // namespace fae::ptx
// clang-format on
"""


def wrapped(items: list[str], indent: str, per_line: int) -> str:
    lines = [", ".join(items[i : i + per_line]) for i in range(0, len(items), per_line)]
    return f",\n{indent}".join(lines)


def asm(n: int, a_in_registers: bool, dtype: str) -> str:
    registers = n // 2
    accumulators = ",".join(f"%{i}" for i in range(registers))
    at = registers
    if a_in_registers:
        a, at = "{" + ",".join(f"%{at + i}" for i in range(4)) + "}", at + 4
        a_inputs = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])'
    else:
        a, at = f"%{at}", at + 1
        a_inputs = '"l"(a)'
    b, accumulate, at = f"%{at}", f"%{at + 1}", at + 2
    transposes = f"%{at}" if a_in_registers else f"%{at}, %{at + 1}"
    outputs = wrapped([f'"+f"(d[{i // 4}][{i % 4}])' for i in range(registers)], " " * 9, 8)
    immediates = '"n"(kTransposeB)' if a_in_registers else '"n"(kTransposeA), "n"(kTransposeB)'
    return (
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {accumulate}, 0;\\n"\n'
        f'        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} {{{accumulators}}}, "\n'
        f'        "{a}, {b}, p, 1, 1, {transposes};\\n}}"\n'
        f"       : {outputs}\n"
        f'       : {a_inputs}, "l"(b), "r"(accumulate), {immediates});'
    )


def function(n: int, a_in_registers: bool) -> str:
    name = "wgmma_rs" if a_in_registers else "wgmma_ss"
    template = "typename T, int kTransposeB" if a_in_registers else "typename T, int kTransposeA, int kTransposeB"
    a = "const uint32_t (&a)[4]" if a_in_registers else "uint64_t a"
    return (
        f"\ntemplate <{template}>\n"
        f"FAE_DEVICE void {name}(float (&d)[{n // 8}][4], {a}, uint64_t b, int accumulate) {{\n"
        f"  if constexpr (std::is_same_v<T, __half>)\n{asm(n, a_in_registers, 'f16')}\n"
        f"  else\n{asm(n, a_in_registers, 'bf16')}\n}}\n"
    )


def text() -> str:
    return HEAD + "".join(function(n, rs) for rs in (False, True) for n in WIDTHS) + TAIL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the file is not fresh")
    path = HERE / "wgmma.cuh"
    fresh = path.is_file() and path.read_text(encoding="utf-8") == text()
    if parser.parse_args().check:
        return 0 if fresh else 1
    if not fresh:
        path.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
