"""SECURITY.md: every test and session that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "SECURITY.md"


def test_the_page_names_tests_and_sessions_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    tests = set(re.findall(r"`(tests/[^`]+\.py)`", text))
    sessions = set(re.findall(r"`nox -s ([^`]+)`", text))
    assert len(tests) > 20
    assert sessions
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert not [name for name in tests if not (ROOT / name).is_file()]
    assert not [name for name in sessions if f"\ndef {name}(" not in noxfile]


def test_every_row_of_what_protects_names_a_test():
    table = PAGE.read_text(encoding="utf-8").partition("| shown by |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines()[2:] if line.startswith("|")]
    assert len(rows) > 10
    assert not [row for row in rows if "`tests/" not in row and "`nox -s " not in row]
