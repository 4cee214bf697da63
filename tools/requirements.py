"""Prints the requirements of the named groups of pyproject.toml, one per line: `build`, or an extra's name.

`pip install -e .[test]` would install them too, but only together with a build; the Makefile wants the packages first.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TEXT = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()


def group(name: str) -> list[str]:
    """The strings of one list; tomllib is not there before Python 3.11, and the lists are plain."""
    key = "requires" if name == "build" else name
    match = re.search(rf"^{re.escape(key)} = \[(.*?)\]$", TEXT, re.MULTILINE | re.DOTALL)
    if match is None:
        sys.exit(f"requirements.py: pyproject.toml has no list named {key!r}")
    return [item for item in re.findall(r'"([^"]+)"', match.group(1)) if not item.startswith("torch")]


if __name__ == "__main__":
    print("\n".join(item for name in sys.argv[1:] for item in group(name)))
