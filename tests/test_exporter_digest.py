"""The cache of exported bundles: one name for one code, another when what exports changes."""

import shutil
from pathlib import Path

import microvlm
from microvlm.backends.resolve import exporter_digest


def test_the_digest_changes_with_the_code_that_exports(tmp_path, monkeypatch):
    package = Path(microvlm.__file__).parent
    copied = tmp_path / "microvlm"
    copied.mkdir()
    for path in package.glob("*.py"):
        shutil.copy(path, copied)
    for name in ("exporters", "formats", "inputs", "model"):
        shutil.copytree(package / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(microvlm, "__file__", str(copied / "__init__.py"))
    digests = [exporter_digest()]
    assert digests == [exporter_digest()]
    for name in (
        "exporters/graph_cleanup.py",
        "exporters/vocabulary/shrink.py",
        "model/memory_modules.py",
        "config.py",
    ):
        assert (copied / name).is_file()
        (copied / name).write_text("changed = True\n")
        digests.append(exporter_digest())
    monkeypatch.setattr(microvlm, "__version__", "9.9")
    digests.append(exporter_digest())
    assert len(set(digests)) == len(digests)
