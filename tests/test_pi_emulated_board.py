"""The whole emulated board: its disks and scripts, the report of its kernel, and an OOM against another failure."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest

from microvlm.bench.pi.board import emulated_board
from microvlm.bench.pi.board.debian import register
from microvlm.bench.pi.board.disk_image import write_data_disk
from microvlm.bench.pi.board.guest_program import GuestCommand, parse_outcomes, supervisor_script
from microvlm.bench.pi.board.initrd import load_order, write_initrd
from microvlm.bench.pi.board.memory_fit import (
    LEFT_BYTES,
    PEAK_BYTES,
    FittedModel,
    complaints,
    conversation,
    full_size_model,
    summarise,
)
from microvlm.bench.pi.pi_records import Fit
from microvlm.bench.pi.pi_tables import fit_table
from microvlm.errors import UserError

MARK = "--mark--"
GROW = "kept = []\nwhile True: kept.append(b'1' * (16 << 20))"
TAKE = "x = b'1' * 100_000_000; print(len(x))"
RUN = {"model": "nano", "program": "caption", "ram_bytes": 512 << 20, "peak_rss_bytes": 90_000_000}


def module(folder: Path, name: str, depends: str = "") -> None:
    (folder / f"{name}.ko").write_bytes(
        b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0vermagic=6\0"
    )


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    folder = tmp_path / "modules"
    folder.mkdir()
    module(folder, "virtio_pci", "virtio,virtio-ring")
    module(folder, "virtio_blk", "virtio")
    module(folder, "virtio", "virtio-ring")
    module(folder, "virtio-ring")
    (folder / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    return folder


def test_modules_follow_their_dependencies_and_built_in_ones_are_left_out(modules: Path) -> None:
    order = [path.name for path in load_order(modules, ("virtio_blk", "virtio_pci", "ext4"))]
    assert order == ["virtio-ring.ko", "virtio.ko", "virtio_blk.ko", "virtio_pci.ko"]


def test_a_module_that_the_kernel_lacks_is_named(modules: Path) -> None:
    with pytest.raises(UserError, match=r"^the kernel's package has no module 'virtio_net': "):
        load_order(modules, ("virtio_net",))


def test_the_initial_ram_disk_is_an_archive_that_a_kernel_reads(
    modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back here by the format's own definition: `newc`, hexadecimal fields, padded to 4 bytes."""
    monkeypatch.setattr("microvlm.bench.pi.board.initrd.MODULES", ("virtio_blk",))
    (tmp_path / "busybox").write_bytes(b"a program of 23 bytes..")
    write_initrd(tmp_path / "initrd", tmp_path / "busybox", modules)
    data, at, entries = (tmp_path / "initrd").read_bytes(), 0, {}
    while True:
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        assert data[at : at + 6] == b"070701"
        name = data[at + 110 : at + 109 + fields[11]].decode()
        start = at + (110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            break
        entries[name] = (fields[1], data[start : start + fields[6]])
        at = start + (fields[6] + 3) // 4 * 4
    assert entries["bin/busybox"] == (0o100755, b"a program of 23 bytes..")
    assert entries["modules/order"][1] == b"virtio-ring.ko\nvirtio.ko\nvirtio_blk.ko\n"
    assert entries["dev"] == (0o040755, b"")
    assert entries["init"][0] == 0o100755
    assert set(entries) >= {"modules/virtio.ko", "newroot", "proc"}


@pytest.mark.parametrize(
    "script", [supervisor_script(MARK), GuestCommand(("a b", "c'd"), environment={"X": "1 2"}).script()]
)
@pytest.mark.posix
def test_the_boards_scripts_are_shell(script: str) -> None:
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


@pytest.mark.posix
def test_a_command_keeps_its_words_and_its_environment() -> None:
    command = GuestCommand(("printf", "%s|", "a b", "c'd", "$X", ""), environment={"X": "1 2"})
    result = subprocess.run(["sh"], input=command.script() + "echo never", capture_output=True, text=True)
    assert result.stdout == "a b|c'd|$X||"


def test_outcomes_are_cut_at_the_marks_and_the_least_available_counts() -> None:
    report = (
        "start 2.50\nmemory 2.5 490000 463000\nmemory 2.7 490000 400000\nmemory 2.9 490000 450000\nend 3.0 0 1000 0\n"
        "start 4.00\nmemory 4.0 490000 463000\nvictim 7 (python3) total-vm:1kB\nend 9.0 137 2000 1\n"
        "start 9.50\nmemory 9.5 490000 463000\n"
    )
    first, second = parse_outcomes(report, f"one\n{MARK}\ntwo{MARK}\n", f"{MARK}\nwhy\n{MARK}\n", MARK)
    assert (first.stdout, second.stdout, first.stderr, second.stderr) == ("one\n", "two", "", "why\n")
    assert (first.exit_status, first.oom, first.seconds) == (0, False, 0.5)
    assert (first.peak_rss_bytes, first.total_bytes) == (1000 * 1024, 490000 * 1024)
    assert first.available_bytes == 400000 * 1024
    assert [round(second, 3) for second, _ in first.available] == [0, 0.2, 0.4]
    assert second.exit_status == 137
    assert second.oom_victims == ("7 (python3) total-vm:1kB",)


def test_the_counter_proves_an_oom_whose_victim_the_log_lost() -> None:
    report = "start 1\nmemory 1 9 9\nend 2 137 5 1\n"
    (outcome,) = parse_outcomes(report, f"{MARK}\n", f"{MARK}\n", MARK)
    assert outcome.oom_victims == ("a process that the kernel's log does not name",)


@pytest.mark.emulated
def test_a_data_disk_holds_files_folders_and_programs(tmp_path: Path) -> None:
    """Read back by e2fsprogs' own debugger."""
    folder = tmp_path / "model"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "weights").write_bytes(bytes(3_000_000))
    (tmp_path / "link").symlink_to(folder / "onnx" / "weights")
    files = {"m": folder, "link": tmp_path / "link", "bin/run": "#!/bin/sh\n", "text": "hello\n"}
    write_data_disk(files, tmp_path / "disk")

    def look(request: str) -> str:
        result = subprocess.run(
            ["/usr/sbin/debugfs", "-R", request, str(tmp_path / "disk")], capture_output=True, text=True
        )
        return result.stdout

    assert look("cat text") == "hello\n"
    assert "Size: 3000000" in look("stat m/onnx/weights")
    assert "Size: 3000000" in look("stat link")
    assert re.search(r"Mode:\s+0755", look("stat bin/run"))
    assert re.search(r"Mode:\s+0644", look("stat text"))


def test_a_missing_emulator_is_named_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        emulated_board.open_emulated_board(512)
    assert str(error.value) == "QEMU's aarch64 machine was not found: apt-get install qemu-system-arm."


def test_dpkg_lists_an_unpacked_package_as_installed(tmp_path: Path) -> None:
    package, root = tmp_path / "package", tmp_path / "root"
    (package / "DEBIAN").mkdir(parents=True)
    (package / "usr" / "lib").mkdir(parents=True)
    (package / "usr" / "lib" / "x.so").write_text("x")
    (package / "DEBIAN" / "control").write_text(
        "Package: libx\nVersion: 2.0-1\nArchitecture: arm64\nMulti-Arch: same\nMaintainer: A <a@b.c>\n"
        "Depends: liby (>= 1)\nDescription: x\n Package: is a word here too\n"
    )
    subprocess.run(
        ["dpkg-deb", "--build", str(package), str(tmp_path / "x.deb")], check=True, capture_output=True
    )
    register(tmp_path / "x.deb", root)
    database = root / "var" / "lib" / "dpkg"
    query = ["dpkg-query", f"--admindir={database}", "-W", "-f", "${Package} ${Version} ${db:Status-Abbrev}"]
    assert subprocess.run(query, capture_output=True, text=True).stdout.strip() == "libx 2.0-1 ii"
    assert (database / "info" / "libx:arm64.list").read_text() == "/.\n/usr\n/usr/lib\n/usr/lib/x.so\n"


def test_the_summary_is_that_of_the_tightest_run_and_an_oom_is_the_tightest() -> None:
    roomy, tight = (
        {**RUN, "oom": False, "available_bytes": 300},
        {**RUN, "oom": False, "available_bytes": 200},
    )
    dead = {**RUN, "oom": True, "available_bytes": 250}
    assert summarise([roomy, tight])["available_bytes"] == 200
    summary = summarise([roomy, tight, dead])
    assert (summary["available_bytes"], summary["oom"], len(summary["runs"])) == (250, True, 3)
    rows = fit_table(msgspec.convert(summary, Fit)).rows
    assert [row[-1] for row in rows] == ["out of memory", "no", "no", "yes"]


def test_complaints_name_every_oom_and_a_full_size_model_over_its_bounds() -> None:
    models = [FittedModel("nano", Path("n")), full_size_model("full", Path("f"))]
    run = {"ram_bytes": 448 << 20, "peak_rss_bytes": PEAK_BYTES, "available_bytes": LEFT_BYTES, "oom": False}
    fits = {**run, "model": "full", "program": "caption"}
    large = {**fits, "peak_rss_bytes": PEAK_BYTES + 1}
    crowded = {**large, "program": "chat", "available_bytes": LEFT_BYTES - 1}
    small = {**crowded, "model": "nano", "peak_rss_bytes": PEAK_BYTES + 1}
    dead = {**small, "oom": True, "oom_victims": ["1234 (python3)"]}
    assert complaints(models, [fits, small]) == []
    assert complaints(models, [large, crowded, dead]) == [
        "chat of nano ran out of memory in 448 MiB: 1234 (python3)",
        "caption of full peaks at 250000001 bytes, over 250000000, in 448 MiB",
        "chat of full leaves 149999999 bytes, under 150000000, in 448 MiB",
    ]
    # A full-size turn takes a minute: few turns, and only where memory is tightest.
    assert [model.turns for model in models] == [10, 4]
    assert [model.chats_up_to_mb for model in models] == [512, 448]


def test_the_boards_programs_are_the_console_scripts_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    for program, function in emulated_board.PROGRAMS.items():
        assert project["project"]["scripts"][program] == f"microvlm.cli:{function}"


def test_a_conversation_has_as_many_turns_as_it_says() -> None:
    lines = conversation(10).splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("/image ")
    assert sum(line.startswith("/recall ") for line in lines) == 4


@pytest.mark.slow
@pytest.mark.emulated
def test_a_board_with_448_mb_has_its_memory_its_peaks_and_its_oom_killer() -> None:
    """Debian's kernel in the emulator; the image is built into the user's own cache."""
    board = emulated_board.open_emulated_board(448, files={"hello": "world\n"})
    commands = [GuestCommand(("python3", "-c", code)) for code in (TAKE, GROW, "raise SystemExit(3)")]
    commands.append(GuestCommand(("cat", "/srv/hello", "-", "/proc/swaps"), stdin="typed\n"))
    allocated, grown, failed, read = board.run(commands, timeout_s=600)
    assert (allocated.exit_status, allocated.stdout, allocated.oom) == (0, "100000000\n", False)
    assert 100_000_000 < allocated.peak_rss_bytes < 115_000_000
    assert 400_000_000 < allocated.total_bytes < 448 << 20
    assert allocated.total_bytes - allocated.available_bytes > 100_000_000
    assert (grown.exit_status, grown.oom) == (137, True)
    assert "python3" in grown.oom_victims[0]
    assert grown.peak_rss_bytes > 300_000_000
    assert (failed.exit_status, failed.oom) == (3, False)
    assert read.stdout.startswith("world\ntyped\n")
    assert len(read.stdout.splitlines()) == 3  # the heading of /proc/swaps and no swap
