"""Saved reports: every kind is read by its name, and a file that is none is one sentence."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import another_user

from microvlm.bench import provenance, report
from microvlm.bench.bench_command import command
from microvlm.bench.report_flags import ReportOutput
from microvlm.errors import UserError

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *sorted((ROOT / "docs" / "results").glob("*.json")),
    ROOT / "training" / "recipes" / "nano-metrics.json",
    ROOT / "bench" / "pi" / "baselines" / "nano-cortex-a53.json",
]
PROVENANCE = {
    "models": [
        {"name": "m", "total_bytes": 3, "files": {"a": 1, "b": 2}},
        {"name": "n", "total_bytes": 5, "files": {"b": 5}},
    ],
    "cpu": "c",
    "cores": 1,
    "threads": 1,
    "os": "o",
    "python": "3",
    "versions": {"numpy": "2"},
    "date_utc": "d",
}
SKIPPED = {"backend": "ort", "label": "ort", "status": "skipped", "reason": "no ort.", "phases": {}}
RUN = {"report": "run", "results": [SKIPPED], "provenance": PROVENANCE}


def test_a_saved_report_becomes_markdown(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    result = CliRunner().invoke(command, ["report", str(tmp_path / "run.json")], standalone_mode=False)
    assert "| b | 2 | 5 |" in result.stdout
    assert "- ort skipped: no ort." in result.stdout


def test_a_report_and_its_markdown_go_into_files_that_cannot_be_replaced(public_folder: Path) -> None:
    paths = [public_folder / name for name in ("report.json", "report.md")]
    for path in paths:
        path.touch()
        path.chmod(0o666)
    with another_user():
        ReportOutput(as_json=False, markdown=paths[1], json_file=paths[0]).deliver(RUN)
    assert json.loads(paths[0].read_text()) == RUN
    assert "| b | 2 | 5 |" in paths[1].read_text()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a report"),
        ("{}", "not a report of microvlm-bench, or one of another version: it has no field 'report'"),
        ('{"results": []}', "it has no field 'report'"),
        ('{"report": "weather"}', "unknown kind 'weather'"),
        ('{"report": ["run"]}', "unknown kind"),
        (json.dumps({**RUN, "provenance": 1}), "this 'run' report is damaged or of another version"),
        (json.dumps({**RUN, "results": {"label": 1}}), "this 'run' report is damaged"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_no_report_is_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence) as refusal:
        command.main(["report", str(path)], standalone_mode=False)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("kind", report.READERS)
def test_an_empty_document_of_every_kind_is_one_sentence(kind: str) -> None:
    with pytest.raises(UserError, match=f"this '{kind}' report is damaged"):
        report.read_report({"report": kind})


def test_a_report_names_the_commit_of_the_code_and_a_copy_of_the_modules_has_the_same_hash(
    tmp_path: Path,
) -> None:
    facts = {
        **PROVENANCE,
        "commit": {"hash": "0123456789abcdef", "date": "2026-01-02T03:04:05Z", "changed": True},
    }
    assert "commit 0123456789 with changes of 2026-01-02, measured d" in report.provenance_line(facts)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "module.py").write_text("a = 1\n")
    (second / "data.json").write_text("{}")
    assert provenance.modules_hash(first) == provenance.modules_hash(second)
    (second / "part" / "module.py").write_text("a = 2\n")
    assert provenance.modules_hash(first) != provenance.modules_hash(second)


def test_the_commit_of_a_checkout_is_found_and_says_whether_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "microvlm" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(provenance.microvlm, "__file__", str(package))
    monkeypatch.setattr(provenance, "_installed_from", lambda: None)
    assert provenance.commit() is None
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    clean = provenance.commit()
    assert clean is not None
    assert len(clean["hash"]) == 40
    assert clean["changed"] is False
    package.write_text("a = 1\n")
    assert provenance.commit() == {**clean, "changed": True}


def test_bench_imports_without_torch_transformers_or_onnx() -> None:
    """All modules but the one that trains."""
    program = (
        "import sys, importlib, pkgutil\n"
        "import microvlm.bench as bench\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'onnx', 'onnxscript')))\n"
        "modules = [found.name for found in pkgutil.walk_packages(bench.__path__, 'microvlm.bench.')]\n"
        "assert len(modules) > 50, modules\n"
        "for name in modules:\n"
        "    if name != 'microvlm.bench.memory.tuning':\n"
        "        importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def mutations(value: object, rng: random.Random, depth: int = 0) -> object:
    """A copy with about one part removed, or replaced by one of another type."""
    if rng.random() < 0.05 * depth:
        return rng.choice([None, 2**31, -1.5, "x", [], {}, [[]], {"x": 1}, 10**400])
    if isinstance(value, dict):
        parts = {key: mutations(part, rng, depth + 1) for key, part in value.items() if rng.random() > 0.02}
        return parts if depth else {**parts, "report": value["report"]}
    if isinstance(value, list):
        return [mutations(part, rng, depth + 1) for part in value if rng.random() > 0.02]
    return value


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_damaged_document_is_one_sentence(path: Path) -> None:
    document = report.load_document(path)
    report.read_report(document).text()
    for seed in range(200):
        with contextlib.suppress(UserError):
            report.text(mutations(document, random.Random(seed)))
