"""The page that installs on a board: its commands are found, its promises are held against what a shell prints.

`bash .ci/nox -s pi-install` runs the page on an emulated board; here a shell of this machine stands in for it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from page_commands import Step, complaints, is_as_promised, read_steps, script
from PIL import Image

from microvlm import MicroVLM

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "raspberry-pi.md"
MARK = "--mark--"


def run_here(steps: list[Step]) -> str:
    return subprocess.run(
        ["bash"], input=script(steps, MARK), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout


def test_the_page_goes_from_a_bare_system_to_a_caption() -> None:
    commands = [step.command for step in read_steps(PAGE)]
    order = ["apt-get install -y python3-venv", "-m venv", "pip install", "activate", "microvlm caption"]
    places = [next(n for n, command in enumerate(commands) if part in command) for part in order]
    assert places == sorted(places)
    assert not any("git clone" in command or "curl" in command for command in commands)


def test_every_shown_command_is_one_that_is_run() -> None:
    """A block of another language would be shown and never tried; the two on the computer are the sessions' own."""
    text = PAGE.read_text()
    assert text.count("```") == 2 * (text.count("```console\n") + text.count("```bash\n"))
    computer = text[: text.index("## On the Pi")]
    assert text.count("```bash\n") == computer.count("```bash\n") == 1
    assert '@nox.session(name="pi-files")' in (ROOT / "noxfile.py").read_text()
    assert "bash .ci/nox -s pi-files -- board\n" in computer


def test_the_bundled_model_says_what_the_page_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newly trained weights may say something else of the picture: told here, not by a session that takes minutes."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    from pi_files import PICTURE

    with Image.open(PICTURE) as picture:
        (said,) = MicroVLM.from_pretrained("nano").generate(images=[picture])
    steps = read_steps(PAGE)
    captions = {step.promised for step in steps if "microvlm caption" in step.command}
    assert captions == {(said,)}
    (chat,) = (step.promised for step in steps if "microvlm chat" in step.command)
    assert chat[0] == said
    assert chat[-1].endswith(f" {said}")


@pytest.mark.parametrize(
    ("output", "promised", "held"),
    [
        ("", (), True),
        ("a\n\n", ("a",), True),
        ("a\nb\n", ("a",), False),
        ("a\nb\nc\n", ("a", "...", "c"), True),
        ("a\nc\n", ("a", "...", "c"), True),
        ("x\n", ("...",), True),
        (
            "Successfully installed numpy-2 microvlm-0.1.0 x-1\n",
            ("Successfully installed ... microvlm-0.1.0 ...",),
            True,
        ),
        ("Successfully installed numpy-2\n", ("Successfully installed ... microvlm-0.1.0 ...",), False),
        ("aXb\n", ("a.b",), False),
    ],
)
def test_output_is_held_against_the_promise(output: str, promised: tuple[str, ...], held: bool) -> None:
    assert is_as_promised(output, promised) is held


@pytest.mark.posix
def test_commands_share_a_shell_and_what_they_print_is_told_apart() -> None:
    steps = [Step("x=7", ()), Step("printf %s $x", ("7",)), Step("cd /; pwd; false || true", ("/",))]
    assert complaints(steps, run_here(steps), MARK) == []


@pytest.mark.posix
def test_a_failure_a_broken_promise_and_an_unfinished_command_are_complaints() -> None:
    steps = [
        Step("false", ()),
        Step("echo one", ("two",)),
        Step("exit 0", ()),
        Step("echo never", ("never",)),
    ]
    found = complaints(steps, run_here(steps), MARK)
    assert [complaint.splitlines()[1] for complaint in found] == [
        "exit status 1, output:",
        "exit status 0, output:",
        "it did not end",
        "it did not end",
    ]


def test_output_before_a_command_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\nhello\n$ echo\n```\n")
    with pytest.raises(ValueError, match=r"page\.md has a console block that starts with output: 'hello"):
        read_steps(page)
