"""The page that is written from the commands is that of these commands."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import describe_commands

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_current() -> None:
    """Else run ``python tools/describe_commands.py``."""
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert page == describe_commands.described()
