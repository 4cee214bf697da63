"""Prints how long each file took to compile, slowest first, from ninja's log of the last build."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    directory = Path(sys.argv[1])
    log = directory / ".ninja_log"
    if not log.exists():
        sys.exit(f"build_times.py: no build has run yet ({log} is missing); call `make build`")
    latest: dict[str, float] = {}  # a rebuilt file stands again further down
    for line in log.read_text().splitlines():
        if line.startswith("#"):
            continue
        begin, end, _, output, _ = line.split("\t")
        latest[output] = (int(end) - int(begin)) / 1000
    for output, seconds in sorted(latest.items(), key=lambda item: -item[1]):
        name = output.partition("objects/")[2] or output
        print(f"{seconds:7.1f} s  {name}")
    print(f"{sum(latest.values()):7.1f} s  in all (one core)")


if __name__ == "__main__":
    main()
