"""Pages are rendered from saved reports: those of this repository are, and a changed number anywhere is found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from microvlm.bench import report_pages
from microvlm.bench.bench_command import command
from microvlm.bench.provenance import recorded_name
from microvlm.bench.report import READERS, UNMEASURED
from microvlm.bench.scores.answer_plots import plots
from microvlm.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
DOCUMENTS = sorted((ROOT / "docs" / "results").glob("*.json"))


def check(*paths: Path) -> tuple[int, str]:
    result = CliRunner().invoke(
        command, ["report", "--pages", "--check", *map(str, paths)], standalone_mode=False
    )
    assert result.exception is None, result.exception
    return result.return_value, result.stderr


def test_the_tables_of_this_repository_are_those_of_its_documents() -> None:
    status, sentences = check(*PAGES)
    assert status == 0, sentences


def test_the_pages_show_every_kind_of_report_and_every_document() -> None:
    shown_paths = set()
    for page in PAGES:
        names = re.findall(r"^<!-- report (\S+)", page.read_text(), re.M)
        shown_paths |= {(page.parent / name).resolve() for name in names}
    assert set(DOCUMENTS) <= shown_paths
    kinds = {json.loads(path.read_text())["report"] for path in shown_paths}
    assert kinds == set(READERS)


def test_the_plots_that_a_page_shows_are_those_of_its_document() -> None:
    document = json.loads((ROOT / "docs" / "results" / "answers-photo.json").read_text())
    folder = ROOT / "docs" / "pictures" / "photo"
    assert {path.name: path.read_text() for path in folder.iterdir()} == plots(document)


MEASURED = [path for path in DOCUMENTS if json.loads(path.read_text())["report"] not in UNMEASURED]


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_every_result_says_where_when_and_of_which_commit_it_was_measured(path: Path) -> None:
    facts = json.loads(path.read_text())["provenance"]
    for fact in ("date_utc", "cpu", "cores", "machine", "os", "python", "versions", "load_average", "commit"):
        assert facts[fact], fact
    assert re.fullmatch(r"[0-9a-f]{40}", facts["commit"]["hash"])
    assert facts["commit"]["date"].startswith("20")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A copy of the pages and documents, which passes the check."""
    for name in ("docs", "bench/pi/baselines", "training/recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    folder = tmp_path / "docs"
    assert check(folder)[0] == 0
    return folder


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "results").glob("*.json")), ids=lambda path: path.stem
)
def test_no_result_says_where_a_machine_kept_its_model(path: Path) -> None:
    assert not re.search(r'"/(home|root|work|tmp|Users|mnt|data)/', path.read_text(encoding="utf-8"))


def test_a_model_is_recorded_without_the_folder_that_a_machine_keeps_it_in() -> None:
    assert recorded_name("/home/ann/models/photo-1.58bit") == "photo-1.58bit"
    assert recorded_name("runs/mine/checkpoint") == "runs/mine/checkpoint"


def test_a_changed_number_in_a_document_fails_the_check_and_is_rendered(docs: Path) -> None:
    path, page = docs / "results" / "run-nano.json", docs / "results.md"
    document = json.loads(path.read_text())
    document["results"][0]["phases"]["prefill"]["median_ms"] = 1234.5
    path.write_text(json.dumps(document))
    status, sentences = check(docs)
    assert status == 1
    (line,) = [
        number for number, line in enumerate(page.read_text().splitlines(), 1) if "section=phases" in line
    ]
    assert f"{page}:{line}: results/run-nano.json section=phases differs from its report" in sentences
    assert "1234.5" not in page.read_text()
    assert command.main(["report", "--pages", str(docs)], standalone_mode=False) == 0
    assert "| prefill | 1234.50 (" in page.read_text()
    assert check(docs)[0] == 0


def test_a_changed_number_in_a_page_fails_the_check_and_is_restored(docs: Path) -> None:
    page = docs / "results.md"
    before = page.read_text()
    changed = re.sub(r"(\| decode \(a token\) \| )\d", r"\g<1>9", before)
    assert changed != before
    page.write_text(changed)
    status, sentences = check(page)
    assert status == 1
    assert "results/run-nano.json section=phases differs" in sentences
    assert command.main(["report", "--pages", str(page)], standalone_mode=False) == 0
    assert page.read_text() == before


def render(text: str, folder: Path) -> str:
    return report_pages.render_page(text, folder / "page.md")[0]


def test_columns_and_rows_are_chosen_and_ordered_by_name(docs: Path) -> None:
    block = '<!-- report results/run-nano.json section=phases columns="phase; ort" rows="prefill; load" -->'
    rendered = render(f"before\n\n{block}\nold\n<!-- end -->\n\nafter\n", docs).splitlines()
    assert rendered[:5] == ["before", "", block, "| phase | ort |", "| --- | ---: |"]
    assert [line.split(" | ")[0] for line in rendered[5:7]] == ["| prefill", "| load"]
    assert rendered[7:] == ["<!-- end -->", "", "after"]


def test_a_block_inside_of_a_code_fence_is_an_example(docs: Path) -> None:
    text = "```\n<!-- report no.json section=phases -->\n<!-- end -->\n```\n"
    assert render(text, docs) == text


def test_a_page_keeps_its_line_ends_and_unusual_characters(docs: Path) -> None:
    block = '<!-- report results/run-nano.json section=phases columns="phase; ort" rows="prefill; load" -->'
    page = docs / "page.md"
    for line_end in ("\n", "\r\n"):
        before, after = f"a\fb\u2028c\x85d{line_end}{line_end}{block}{line_end}", f"<!-- end -->{line_end}e"
        page.write_bytes(f"{before}old{line_end}{after}".encode())
        assert check(page)[0] == 1
        assert command.main(["report", "--pages", str(page)], standalone_mode=False) == 0
        text = page.read_bytes().decode()
        assert text.startswith(before + "| phase | ort |" + line_end)
        assert text.endswith(line_end + after)
        assert text.count("\r") == (text.count("\n") if line_end == "\r\n" else 0)
        assert check(page)[0] == 0


def test_a_page_that_cannot_be_written_whole_stays_as_it_was(docs: Path) -> None:
    from conftest import files_below

    page = docs / "results.md"
    before = page.read_bytes().replace(b"| prefill | ", b"| prefill | 9")
    page.write_bytes(before)
    with files_below(1000), pytest.raises(UserError, match=r"results\.md cannot be written"):
        command.main(["report", "--pages", str(page)], standalone_mode=False)
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ("results/none.json", "does not exist"),
        ("results/run-nano.json section=speed", "no section 'speed'; it has phases, memory"),
        ("results/run-nano.json section=phases columns=cuda", "no column 'cuda'; there are: phase; "),
        ("results/run-nano.json section=phases rows=sleep", "no row 'sleep'; there are: load; "),
        ("results/run-nano.json colour=red", "no option 'colour'"),
        ("results/run-nano.json section=remarks rows=a", "choose from a table"),
        ('results/run-nano.json section="', "cannot be read"),
    ],
)
def test_a_block_that_cannot_be_rendered_is_one_sentence_with_its_place(
    docs: Path, block: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)) as refusal:
        render(f"one\n<!-- report {block} -->\n<!-- end -->\n", docs)
    assert str(refusal.value).startswith(f"{docs / 'page.md'}:2: ")


def test_a_block_without_an_end_is_one_sentence(docs: Path) -> None:
    for tail in ("", "<!-- report results/run-nano.json section=memory -->\n<!-- end -->\n"):
        with pytest.raises(UserError, match=r"page\.md:1: this block has no end"):
            render(f"<!-- report results/run-nano.json section=phases -->\n{tail}", docs)


def test_a_path_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give Markdown files or folders"):
        command.main(["report", "--pages", str(tmp_path / "none")], standalone_mode=False)
