"""The cache of exported bundles: one name for one code, another when what exports changes."""

import shutil
from pathlib import Path

import microvlm
from microvlm.backends.resolve import exporter_digest


def test_the_digest_changes_with_the_code_that_exports(tmp_path, monkeypatch):
    package = Path(microvlm.__file__).parent
    package_copy = tmp_path / "microvlm"
    package_copy.mkdir()
    for path in package.glob("*.py"):
        shutil.copy(path, package_copy)
    for name in ("configuration", "exporters", "formats", "inputs", "model", "sizes"):
        shutil.copytree(package / name, package_copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(microvlm, "__file__", str(package_copy / "__init__.py"))
    digests = [exporter_digest()]
    assert digests == [exporter_digest()]
    for name in (
        "exporters/graph_cleanup.py",
        "exporters/vocabulary/shrink.py",
        "model/memory_modules.py",
        "config.py",
        "configuration/checked_fields.py",
    ):
        assert (package_copy / name).is_file()
        (package_copy / name).write_text("changed = True\n")
        digests.append(exporter_digest())
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"another {name}")
    digests.append(exporter_digest())
    monkeypatch.setattr(microvlm, "__version__", "9.9")
    digests.append(exporter_digest())
    assert len(set(digests)) == len(digests)
