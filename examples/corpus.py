"""The text that every machine with Python has: the standard library's own sources and documentation strings."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# One fixed vocabulary, so that a checkpoint does not depend on which characters a Python version happens to use:
# newline and printable ASCII, one byte each. Losses are therefore nats per byte.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(ALPHABET)
_CODE = bytes(ALPHABET.index(chr(byte)) if chr(byte) in ALPHABET else ALPHABET.index("?") for byte in range(256))

# `encodings` is mostly generated tables, `pydoc_data` one literal of several hundred kilobytes: either would be a
# large, dull share of the text. Bundled wheels, tests and installed packages are not the standard library proper.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "_bundled"}
    | {"site-packages", "dist-packages", "__pycache__"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")  # written when Python was built, differ by machine
_VALIDATION_EVERY = 12  # one file in twelve is held out; whole files, so no window of it is ever trained on


@dataclass(frozen=True)
class Corpus:
    """Encoded text, split by file.

    Attributes
    ----------
    train, validation : Tensor
        Codes into `ALPHABET`, 1-D, uint8.
    files : int
        How many files were read.
    fingerprint : str
        Checksum of both parts: tells a checkpoint that it is resumed on the text it was trained on.
    """

    train: Tensor
    validation: Tensor
    files: int
    fingerprint: str

    def batches(
        self, part: str, batch: int, seq_len: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield random windows without end; the generator's state alone decides what comes next.

        Parameters
        ----------
        part : {"train", "validation"}
            Which text.
        batch, seq_len : int
            Windows per batch, characters per window.
        generator : torch.Generator
            CPU generator. Saving and restoring its state resumes the order of the data.

        Yields
        ------
        tuple of Tensor
            Inputs and targets, `(batch, seq_len)`, int64, the targets one character ahead.
        """
        text: Tensor = getattr(self, part)
        if text.numel() <= seq_len:
            raise ValueError(f"the {part} text has {text.numel():,} characters, too few for a window of {seq_len:,}")
        span = torch.arange(seq_len + 1)
        while True:
            start = torch.randint(text.numel() - seq_len, (batch, 1), generator=generator)
            window = text[start + span].long()
            yield window[:, :-1], window[:, 1:]


def encode(text: str) -> Tensor:
    """Map text to codes, 1-D uint8; tabs become spaces and a character outside `ALPHABET` becomes `?`."""
    return _encode_bytes(text.expandtabs().encode("ascii", "replace"))


def decode(codes: Tensor) -> str:
    """Map 1-D codes back to text."""
    return "".join(ALPHABET[code] for code in codes.tolist())


def _encode_bytes(text: bytes) -> Tensor:
    codes = bytearray(text.translate(_CODE))
    return torch.frombuffer(codes, dtype=torch.uint8) if codes else torch.empty(0, dtype=torch.uint8)


def standard_library_files() -> list[Path]:
    """List the library's Python sources in an order that depends on their names alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        generated = any(part.startswith(_SKIPPED_PREFIXES) for part in relative.parts)
        if generated or _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        found.append((zlib.crc32(relative.as_posix().encode()), relative.as_posix(), path))
    # Ordered by a checksum of the name: alphabetical order would make the size cap a choice of the letters a to h.
    return [path for _, _, path in sorted(found)]


def load_corpus(limit_bytes: int = 4_000_000) -> Corpus:
    """Read the standard library up to a size.

    Parameters
    ----------
    limit_bytes : int
        Stop once this much has been read.

    Returns
    -------
    Corpus

    Raises
    ------
    RuntimeError
        If this Python was installed without the sources of its library.
    """
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    total = files = 0
    for path in standard_library_files():
        if total >= limit_bytes:
            break
        try:
            text = path.read_text(encoding="utf-8").expandtabs().strip("\n").encode("ascii", "replace") + b"\n\n\n"
        except (OSError, UnicodeDecodeError):  # a file in another encoding is no loss to the demo
            continue
        parts[files % _VALIDATION_EVERY == 0].append(text)
        total, files = total + len(text), files + 1
    if total < 100_000:
        raise RuntimeError(
            f"found only {total:,} bytes of Python sources under {sysconfig.get_paths()['stdlib']}: this Python was "
            "installed without its library's sources. Use one that has them (python.org, a distribution, conda, uv)"
        )
    train, validation = b"".join(parts[False]), b"".join(parts[True])
    fingerprint = f"{zlib.crc32(train):08x}{zlib.crc32(validation):08x}"
    return Corpus(_encode_bytes(train), _encode_bytes(validation), files, fingerprint)
