"""The planted faults still fit the sources, and their page lists them. ``make planted-faults`` plants them."""

from __future__ import annotations

import re
from pathlib import Path

import planted_faults
import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_every_fault_applies_to_the_sources() -> None:
    planted_faults.check_that_all_apply()
    assert len({fault.name for fault in planted_faults.FAULTS}) == len(planted_faults.FAULTS) >= 10


def test_a_fault_that_no_longer_applies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = planted_faults.Fault("stale", "core/mask.h", "no such text", "FAULT", "")
    monkeypatch.setattr(planted_faults, "FAULTS", [*planted_faults.FAULTS, stale])
    with pytest.raises(ValueError, match=r"stale: 0 places in csrc/core/mask.h"):
        planted_faults.check_that_all_apply()


def test_the_page_lists_every_fault_and_existing_tests() -> None:
    page = (ROOT / "docs" / "planted-faults.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| `csrc/(\S+)` \| (.*) \| `(\S+?)(?:::(\w+))?` \|$", page, re.MULTILINE)
    assert [row[:3] for row in rows] == [(f.name, f.file, f.meaning) for f in planted_faults.FAULTS]
    for *_, file, test in rows:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), (file, test)
