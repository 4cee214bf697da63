"""Builds the two shared objects of flash_attn_ext.

`flash_attn_ext/_ops.so`   operators and engines; no Python symbol in it, loaded by `torch.ops.load_library`.
`flash_attn_ext/_C.*.so`   pybind11 introspection, linked to `_ops.so`.

Environment
    FLASH_ATTN_EXT_CUDA=auto|1|0   auto (default): CUDA sources are compiled if torch is a CUDA build and nvcc is there.
    TORCH_CUDA_ARCH_LIST           default 8.0+PTX;9.0a. No GPU is needed to build.
    MAX_JOBS                       parallel compilations; default by cores and free memory.
    FLASH_ATTN_EXT_BUILD_DIR       keeps object files there, so that the next build compiles only what changed.
    FLASH_ATTN_EXT_DEBUG=1         -O1 with symbols; CUDA code stays -O3 and gets line numbers, for profilers.
    FLASH_ATTN_EXT_SANITIZE        address,undefined or others: adds sanitizers.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0+PTX;9.0a"

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "flash_attn_ext: PyTorch is not installed where this build runs. Install it first, then build against it:\n"
        "    pip install 'torch>=2.11'\n"
        "    pip install --no-build-isolation ."
    )


def notice(text: str) -> None:
    """Print a boxed line that survives the noise of a build."""
    width = max(map(len, text.splitlines()))
    box = "\n".join(["+" + "-" * (width + 2) + "+", *(f"| {line:<{width}} |" for line in text.splitlines())])
    print(f"{box}\n+{'-' * (width + 2)}+", file=sys.stderr)


def find_nvcc() -> str | None:
    """Version line of a working nvcc, or None."""
    if cpp_extension.CUDA_HOME is None:
        return None
    try:
        nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return next((line.strip() for line in text.splitlines() if "release" in line), "unknown")


def decide_cuda() -> tuple[bool, str]:
    """Whether CUDA sources are compiled, and the reason."""
    mode = os.environ.get("FLASH_ATTN_EXT_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"flash_attn_ext: FLASH_ATTN_EXT_CUDA={mode!r}; it has to be auto, 1 or 0")
    if mode == "0":
        return False, "FLASH_ATTN_EXT_CUDA=0"
    if torch.version.hip is not None:
        missing = "this PyTorch is a ROCm build; only CUDA is supported"
    elif torch.version.cuda is None:
        missing = "this PyTorch is a CPU build"
    elif (nvcc := find_nvcc()) is None:
        missing = f"no nvcc was found (CUDA {torch.version.cuda} is wanted; set CUDA_HOME or install the toolkit)"
    else:
        return True, f"torch CUDA {torch.version.cuda}, {nvcc}"
    if mode == "1":
        sys.exit(f"flash_attn_ext: FLASH_ATTN_EXT_CUDA=1, but {missing}")
    return False, missing


def csrc_sha256() -> str:
    """Hash of every file under csrc/, so that a measurement names the sources it measured."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def set_jobs() -> None:
    """Cap parallel compilations by cores and free memory (about 3 GB each)."""
    if "MAX_JOBS" not in os.environ:
        free_gb = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, int(free_gb / 3))))


with_cuda, cuda_reason = decide_cuda()
archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS) if with_cuda else ""
if {"9.0", "9.0+PTX"} & set(archs.replace(";", " ").split()):
    sys.exit("flash_attn_ext: TORCH_CUDA_ARCH_LIST names 9.0; Hopper's kernels are code for 9.0a: name that instead")
if not with_cuda and os.environ.get("FLASH_ATTN_EXT_CUDA", "auto") == "auto":
    notice(f"flash_attn_ext: building for the CPU only: {cuda_reason}")
set_jobs()

debug = os.environ.get("FLASH_ATTN_EXT_DEBUG", "0") == "1"
sanitize = os.environ.get("FLASH_ATTN_EXT_SANITIZE", "")
# No -std: every PyTorch names the C++ standard its own headers need. No -ffast-math: linking it flips the whole
# process to flush-to-zero. -fno-plt and friends are not worth their noise.
cxx_flags = ["-O1" if debug or sanitize else "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
link_flags = ["-fopenmp", "-Wl,-soname,flash_attn_ext_ops.so"]
if debug or sanitize:
    cxx_flags += ["-g", "-fno-omit-frame-pointer"]
if sanitize:
    cxx_flags.append(f"-fsanitize={sanitize}")
    link_flags.append(f"-fsanitize={sanitize}")
nvcc_flags = ["-O3", "--threads", "2", "-Xcompiler", "-fvisibility=hidden"]
if debug:
    nvcc_flags.append("-lineinfo")  # four times the size of the library
cuda_macros = [("FAE_WITH_CUDA", "1")] if with_cuda else []


def files_of_csrc(*patterns: str) -> list[str]:
    """Of a CPU build none below csrc/cuda/, which needs the toolkit's headers."""
    found = [path for pattern in patterns for path in (ROOT / "csrc").rglob(pattern)]
    found = [path for path in found if with_cuda or "cuda" not in path.relative_to(ROOT / "csrc").parts]
    return sorted(str(path.relative_to(ROOT)) for path in found)


# CUDA first: those files take longest, and a parallel build should not end on one of them.
sources = files_of_csrc("*.cu") + [name for name in files_of_csrc("*.cpp") if not name.endswith("bindings.cpp")]
headers = files_of_csrc("*.h", "*.cuh")

make_extension = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
ops = make_extension(
    "flash_attn_ext._ops",
    sources,
    depends=headers,
    define_macros=cuda_macros,
    extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags} if with_cuda else cxx_flags,
    extra_link_args=link_flags,
    py_limited_api=True,  # keeps libtorch_python out: one file for every Python version
)
introspection = Extension(
    "flash_attn_ext._C",
    ["csrc/bindings.cpp"],
    depends=headers,
    # pybind11 as torch bundles it; the registry's header names types of the CUDA runtime, none of its functions.
    include_dirs=[
        str(Path(torch.__file__).parent / "include"),
        *([str(Path(cpp_extension.CUDA_HOME) / "include")] if with_cuda else []),
    ],
    define_macros=[*cuda_macros, ("FAE_TORCH_VERSION", torch.__version__), ("FAE_CUDA_ARCHS", archs.replace(";", ","))],
    extra_compile_args=["-O1", "-g0", "-fvisibility=hidden"],
    extra_link_args=["-Wl,-rpath,$ORIGIN"],
    language="c++",
)


class BuildExtension(cpp_extension.BuildExtension):
    """Names `_ops.so`, links `_C` to it, and writes `build.json` beside them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if directory := os.environ.get("FLASH_ATTN_EXT_BUILD_DIR"):
            self.build_temp = directory  # pip gives a fresh temporary one to every build

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == "_ops":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("._C"):
            # By path: the loader finds it by its soname among what torch.ops.load_library has loaded already.
            ext.extra_objects = [self.get_ext_fullpath("flash_attn_ext._ops")]
        super().build_extension(ext)

    def run(self) -> None:
        super().run()
        package = Path(self.get_ext_fullpath("flash_attn_ext._ops")).parent
        (package / "build.json").write_text(
            json.dumps(
                {
                    "torch": torch.__version__,
                    "cuda": torch.version.cuda if with_cuda else None,
                    "cuda_reason": cuda_reason,
                    "cuda_archs": archs,
                    "cxx_flags": cxx_flags,
                    "nvcc_flags": nvcc_flags if with_cuda else [],
                    "python": platform.python_version(),
                    "machine": platform.machine(),
                    "csrc_sha256": csrc_sha256(),
                },
                indent=1,
            )
            + "\n"
        )


setup(ext_modules=[ops, introspection], cmdclass={"build_ext": BuildExtension})
