"""docs/raspberry-pi.md: its commands are read, and the output that it shows is compared with a shell's output.

`bash .ci/nox -s pi-install` runs the page on an emulated board; here this machine's shell takes the board's place.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from page_commands import Step, complaints, is_as_promised, read_steps, script
from PIL import Image

from microvlm import MicroVLM
from microvlm.backends.arm64.targets import open_transport
from microvlm.commands.main import cli

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
    """Console blocks run on the board; other blocks are one on the computer, and commands with --target at the end."""
    text = PAGE.read_text()
    assert text.count("```") == 2 * (text.count("```console\n") + text.count("```bash\n"))
    computer, board = text.split("## On the Pi\n")
    board, elsewhere = board.split("## Other ways to run on a Pi\n")
    assert computer.count("```bash\n") == 1
    assert '@nox.session(name="pi-files")' in (ROOT / "noxfile.py").read_text()
    assert "bash .ci/nox -s pi-files -- board\n" in computer
    assert "```bash\n" not in board
    assert "```console\n" not in elsewhere


def test_commands_for_other_targets_have_options_that_exist() -> None:
    elsewhere = PAGE.read_text().split("## Other ways to run on a Pi\n")[1]
    commands = "".join(re.findall(r"(?ms)^```bash\n(.*?)^```$", elsewhere)).splitlines()
    assert len(commands) >= 3
    for line in commands:
        program, name, *arguments = shlex.split(line)
        assert program == "microvlm"
        context = click.Context(cli)
        command = cli.get_command(context, name)
        options, _, _ = command.make_parser(click.Context(command)).parse_args(arguments)
        open_transport(options["target"])


def test_the_bundled_model_gives_the_caption_that_the_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newly trained weights may caption the picture differently: this test says so before a session of minutes does."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    from pi_files import MODEL, PICTURE

    with Image.open(PICTURE) as picture:
        (caption,) = MicroVLM.from_pretrained(MODEL).generate(images=[picture])
    steps = read_steps(PAGE)
    captions = {step.promised for step in steps if "microvlm caption" in step.command}
    assert captions == {(caption,)}
    (chat,) = (step.promised for step in steps if "microvlm chat" in step.command)
    assert chat[0] == caption
    assert chat[-1].endswith(f" {caption}")


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
def test_output_is_compared_with_the_promised_lines(
    output: str, promised: tuple[str, ...], held: bool
) -> None:
    assert is_as_promised(output, promised) is held


@pytest.mark.posix
def test_commands_share_a_shell_and_their_outputs_are_separated() -> None:
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
    sentences = complaints(steps, run_here(steps), MARK)
    assert [complaint.splitlines()[1] for complaint in sentences] == [
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
