"""Saved reports: every kind is read by its name, and a file that is none is one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import another_user, files_below
from document_mutations import check_mutations

from microvlm.bench import provenance, report
from microvlm.bench.bench_command import command
from microvlm.bench.report_flags import ReportOutput
from microvlm.console import run_click
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
        ("{", "is not valid JSON"),
        ("[" * 100_000, "the document must be an object, not a list"),
        ("[]", "the document must be an object, not a list: the report is damaged or of another version"),
        (
            "{}",
            "not a report that this version knows: it has no field 'report', as reports of older versions",
        ),
        ('{"results": []}', "it has no field 'report'"),
        (
            '{"report": "weather"}',
            "is of the kind 'weather', perhaps of a newer version; the kinds are run, ",
        ),
        ('{"report": ["run"]}', "is of the kind "),
        (
            json.dumps({**RUN, "provenance": 1}),
            r"\(a 'run' report\): 'provenance' must be an object, not a whole",
        ),
        (json.dumps({**RUN, "results": {"label": 1}}), "'results' must be a list, not an object"),
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
    with pytest.raises(UserError, match=rf"\(a '{kind}' report\): .* is missing: the report is damaged"):
        report.read_report({"report": kind})


def test_a_report_names_the_commit_of_the_code_and_a_copy_of_the_modules_has_the_same_hash(
    tmp_path: Path,
) -> None:
    facts = {
        **PROVENANCE,
        "commit": {"hash": "0123456789abcdef", "date": "2026-01-02T03:04:05Z", "changed": True},
    }
    line = report.read_report({**RUN, "provenance": facts}).remarks[-1]
    assert "commit 0123456789 with changes of 2026-01-02, measured d" in line
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
    """All modules but those that train or compute in torch, and the one that another program loads."""
    program = (
        "import sys, importlib, pkgutil\n"
        "import microvlm.bench as bench\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'onnx', 'onnxscript')))\n"
        "modules = [found.name for found in pkgutil.walk_packages(bench.__path__, 'microvlm.bench.')]\n"
        "assert len(modules) > 50, modules\n"
        "for name in modules:\n"
        "    if not name.endswith(('memory.tuning', 'lmms_eval.model', 'precision_bench')):\n"
        "        importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def trimmed(value: Any) -> Any:
    """A document with the first items of long lists and of the tables of files alone: the others are like them."""
    if isinstance(value, dict):
        items = list(value.items())
        return {key: trimmed(part) for key, part in items[: 2 if "config.json" in value else None]}
    return (
        [trimmed(part) for part in value[: 2 if len(value) > 3 else None]]
        if isinstance(value, list)
        else value
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_changed_report_is_rendered_or_one_sentence_with_the_field(path: Path) -> None:
    def read(content: bytes) -> None:
        tables = report.parse_report(content, "r.json")
        shown = tables.text()
        assert all(line.isprintable() for line in shown.splitlines())
        assert len(shown) + len(tables.markdown()) < 5_000_000

    assert check_mutations(trimmed(json.loads(path.read_text())), read, least_refused=0.1) > 200


def test_two_models_side_by_side_are_read_like_one() -> None:
    part = json.loads((ROOT / "docs" / "results" / "memory-nano.json").read_text())
    document = {"report": "memory", "subjects": [part, part], "provenance": part["provenance"]}
    assert " on ort: 64 slots; episodic memory of" in report.text(document)
    for changed in ([], None, [part, 1], [part, {**part, "edit": None}], [part] * 65):
        with pytest.raises(UserError, match=r"this document \(a 'memory' report\)"):
            report.text({**document, "subjects": changed or {}})


def test_a_large_report_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(report.LARGEST_REPORT + 1)
    with pytest.raises(UserError, match="more than 8,000,000 bytes"):
        report.report_of_file(path)


def test_a_report_on_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    document, out = tmp_path / "run.json", tmp_path / "run.md"
    document.write_text(json.dumps(RUN))
    out.write_text("old")
    with files_below(10), pytest.raises(UserError, match=r"run\.md cannot be written"):
        command.main(["report", str(document), "-o", str(out)], standalone_mode=False)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.md"]


@pytest.mark.parametrize("option", ["-o", "--markdown"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    option: str, tmp_path, capsys
):
    with pytest.raises(SystemExit) as caught:
        run_click(command, ["run", str(tmp_path / "no-bundle"), option, str(tmp_path / "nowhere" / "r.json")])
    assert caught.value.code == 2
    assert "its folder does not exist; make it first" in capsys.readouterr().err
