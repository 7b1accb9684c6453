"""The page as one document: its style and its program are in it, and nothing else may run in it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent / "static"
_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def read_page() -> tuple[bytes, str]:
    """(the document, its Content-Security-Policy, which allows the one style and the one program by their hashes)."""
    style, script, document = (
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html")
    )
    document = document.replace("/* page.css */", style).replace("/* page.js */", script)
    return document.encode(), _POLICY.format(script=_hash(script), style=_hash(style))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
