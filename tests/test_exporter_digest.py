"""The cache of exported bundles: one name for one code, another when what exports changes."""

import shutil
from pathlib import Path

from microvlm import exporters
from microvlm.backends.resolve import exporter_digest


def test_the_digest_changes_with_the_code_that_exports(tmp_path, monkeypatch):
    package = Path(exporters.__file__).parent
    copied = tmp_path / "microvlm" / "exporters"
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for module in package.parent.glob("*.py"):
        shutil.copy(module, copied.parent)
    monkeypatch.setattr(exporters, "__file__", str(copied / "__init__.py"))
    first = exporter_digest()
    assert first == exporter_digest()
    (copied / "tidy.py").write_text("changed = True\n")
    second = exporter_digest()
    assert second != first
    (copied.parent / "memory_modules.py").write_text("changed = True\n")
    assert exporter_digest() not in (first, second)
