"""Atomic writes: whatever happens to a writer, its target is old or new and whole, and the next writer cleans up."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from microvlm import atomic_folder, temporary_folder
from microvlm.atomic import new_file, write_file
from microvlm.atomic_folder import new_files, new_folder
from microvlm.errors import UserError
from microvlm.temporary_folder import recover, remove_leftovers

pytestmark = pytest.mark.posix

OLD, NEW = b"old" * 3000, b"new" * 3000
FILES = ("config.json", "onnx/weights.data", "onnx/graph.onnx")


@pytest.fixture
def umask():
    """027 while the test runs."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture
def without_exchange(monkeypatch):
    """Imitate a system that cannot exchange two names, so that two renames replace a folder."""
    monkeypatch.setattr(atomic_folder, "_exchange", lambda path, other_path: False)


def fill(folder: Path, content: bytes) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def replace_folder(target: Path, content: bytes, keep_others: bool = False) -> None:
    with new_folder(target, replace=lambda _: True, keep_others=keep_others) as temporary:
        fill(temporary, content)


def contents(target: Path) -> set[bytes]:
    """The contents of a folder that has all of FILES and nothing else."""
    paths = [path for path in target.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(target)) for path in paths) == sorted(FILES)
    return {path.read_bytes() for path in paths}


def test_a_file_has_its_old_content_until_the_block_ends(tmp_path):
    target = tmp_path / "report.json"
    write_file(target, "old ü")
    with new_file(target) as temporary:
        assert temporary.name == target.name
        temporary.write_text("new")
        assert target.read_bytes() == "old ü".encode()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_folder_has_its_old_content_until_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "bundle"
    replace_folder(target, OLD)
    with new_folder(target, replace=lambda _: True) as temporary:
        fill(temporary, NEW)
        assert contents(target) == {OLD}
    assert contents(target) == {NEW}
    assert os.listdir(target.parent) == ["bundle"]


def test_without_an_exchange_of_names_a_folder_is_replaced_by_two_renames(tmp_path, without_exchange):
    replace_folder(tmp_path / "bundle", OLD)
    replace_folder(tmp_path / "bundle", NEW)
    assert contents(tmp_path / "bundle") == {NEW}
    assert os.listdir(tmp_path) == ["bundle"]


def test_when_the_second_rename_fails_the_old_folder_gets_its_name_back(
    tmp_path, without_exchange, monkeypatch
):
    target = tmp_path / "bundle"
    replace_folder(target, OLD)
    rename, destinations = os.rename, []

    def fail_third(source, destination):
        destinations.append(Path(destination))
        if len(destinations) == 3:
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_third)
    with pytest.raises(UserError, match=r"bundle cannot be written: Input/output error\."):
        replace_folder(target, NEW)
    assert (destinations[2], destinations[3]) == (target, target)
    assert contents(target) == {OLD}
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_any_exception_in_the_block_keeps_the_old_content_and_leaves_nothing(tmp_path, error):
    write_file(tmp_path / "file", OLD)
    replace_folder(tmp_path / "folder", OLD)
    for write in (fail_in_file, fail_in_folder):
        with pytest.raises(error):
            write(tmp_path, error)
    assert (tmp_path / "file").read_bytes() == OLD
    assert contents(tmp_path / "folder") == {OLD}
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def fail_in_file(folder: Path, error: type[BaseException]) -> None:
    with new_file(folder / "file") as temporary:
        temporary.write_bytes(NEW)
        raise error


def fail_in_folder(folder: Path, error: type[BaseException]) -> None:
    with new_folder(folder / "folder", replace=lambda _: True) as temporary:
        fill(temporary, NEW)
        raise error


# Forks a writer for each n, which kills itself right before its n-th event: calls of the file system as Python's audit
# hooks report them, and flushes, which they do not report. Then checks the target and writes once more.
_KILL_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from microvlm import atomic, atomic_folder, temporary_folder
from test_atomic import NEW, OLD, contents, replace_folder

folder, kind, has_old = Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "old"
target = folder / "target"
if kind == "two renames":
    atomic_folder._exchange = lambda one, other: False
write = atomic.write_file if kind == "file" else replace_folder

def read():
    if not os.path.lexists(target):
        return None
    if kind == "file":
        return target.read_bytes()
    (content,) = contents(target)
    return content

def die_at(number):
    def count(event, arguments):
        nonlocal number
        if event.startswith(("os.", "open", "fcntl.", "shutil.", "flush")) and event != "os.kill":
            number -= 1
            if number < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    fsync = os.fsync
    os.fsync = lambda descriptor: (count("flush", ()), fsync(descriptor))
    sys.addaudithook(count)

outcomes, nameless, number = set(), 0, 0
while True:
    temporary_folder.remove_leftovers(folder)
    if kind == "file":
        target.unlink(missing_ok=True)
    else:
        import shutil
        shutil.rmtree(target, ignore_errors=True)
    if has_old:
        write(target, OLD)
    process = os.fork()
    if process == 0:
        die_at(number)
        write(target, NEW)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, status
    if has_old and not os.path.lexists(target):
        nameless += 1
        temporary_folder.recover(target)
    outcome = read()
    assert outcome in ((OLD, NEW) if has_old else (None, NEW)), (number, outcome)
    outcomes.add(outcome)
    write(target, OLD)
    assert read() == OLD
    assert os.listdir(folder) == ["target"], (number, os.listdir(folder))
    if not killed:
        break
    number += 1
print(number, len(outcomes), nameless)
"""


@pytest.mark.parametrize("before", ["old", "none"])
@pytest.mark.parametrize("kind", ["file", "exchange", "two renames"])
def test_killed_before_any_call_the_target_is_old_or_new_and_the_next_writer_cleans_up(
    tmp_path, kind, before
):
    command = [
        sys.executable,
        "-P",
        "-c",
        _KILL_EVERYWHERE,
        str(Path(__file__).parent),
        tmp_path,
        kind,
        before,
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    kills, outcomes, nameless = map(int, process.stdout.split())
    assert kills > 10
    assert outcomes == 2
    assert (nameless > 0) == (kind == "two renames" and before == "old")


_WRITE_AND_WAIT = """
import pathlib, sys, time
from microvlm.atomic_folder import new_files, new_folder
with new_folder(pathlib.Path(sys.argv[1])) as temporary:
    (temporary / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_living_writers_folder_is_left_alone_and_a_dead_ones_is_removed(tmp_path):
    target = tmp_path / "folder"
    command = [sys.executable, "-P", "-c", _WRITE_AND_WAIT, str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"writing\n"
        replace_folder(target, NEW)
        remove_leftovers(tmp_path)
        assert len(os.listdir(tmp_path)) == 2
    finally:
        process.kill()
        process.communicate()
    write_file(tmp_path / "other", NEW)
    assert len(os.listdir(tmp_path)) == 3  # only writers of the same target clean up unasked
    replace_folder(target, OLD)
    assert sorted(os.listdir(tmp_path)) == ["folder", "other"]


def test_without_locks_a_temporary_folder_is_abandoned_after_a_day(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(temporary_folder.fcntl, "flock", refuse)
    leftover = tmp_path / ".file.new-0123abcd"
    leftover.mkdir()
    write_file(tmp_path / "file", NEW)
    assert sorted(os.listdir(tmp_path)) == [".file.new-0123abcd", "file"]
    two_days_ago = time.time() - 2 * 86_400
    os.utime(leftover, (two_days_ago, two_days_ago))
    write_file(tmp_path / "file", NEW)
    assert os.listdir(tmp_path) == ["file"]


def test_two_writers_at_once_both_succeed(tmp_path):
    replace_folder(tmp_path / "folder", OLD)
    with new_folder(tmp_path / "folder", replace=lambda _: True) as first:
        with new_folder(tmp_path / "folder", replace=lambda _: True) as second:
            fill(second, OLD)
        fill(first, NEW)
    assert contents(tmp_path / "folder") == {NEW}
    assert os.listdir(tmp_path) == ["folder"]


def test_links_of_our_temporary_names_are_not_followed(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    replace_folder(precious, OLD)
    names = iter(["00000000", "11111111", "22222222"])
    monkeypatch.setattr(temporary_folder.secrets, "token_hex", lambda size: next(names))
    (tmp_path / ".file.new-00000000").symlink_to(precious)
    (tmp_path / ".file.new-11111111").symlink_to(tmp_path / "nowhere")
    write_file(tmp_path / "file", NEW)
    assert contents(precious) == {OLD}
    assert not (tmp_path / "nowhere").exists()
    assert (tmp_path / "file").read_bytes() == NEW


def test_the_content_of_a_leftover_that_links_elsewhere_is_not_removed_there(tmp_path):
    precious = tmp_path / "precious"
    replace_folder(precious, OLD)
    leftover = tmp_path / ".file.new-00000000"
    leftover.mkdir()
    (leftover / "file").symlink_to(precious)
    write_file(tmp_path / "file", NEW)
    assert contents(precious) == {OLD}
    assert sorted(os.listdir(tmp_path)) == ["file", "precious"]


@pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 1)() != 0, reason="needs root to make another user's folder"
)
def test_another_users_folder_never_becomes_the_target(tmp_path):
    planted = tmp_path / ".bundle.new-00000000"
    for name in ("bundle", "bundle.replaced"):
        (planted / name).mkdir(parents=True)
    os.chown(planted, 12345, 12345)
    recover(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_full_disk_keeps_the_old_content_and_is_one_sentence(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mounted]
    if (
        getattr(os, "geteuid", lambda: 1)() != 0
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("a small file system cannot be mounted here")
    try:
        write_file(mounted / "file", OLD)
        replace_folder(mounted / "folder", OLD)
        with pytest.raises(
            UserError, match="file cannot be written: no space is left on the disk; free some"
        ):
            write_file(mounted / "file", bytes(1 << 20))
        with pytest.raises(UserError, match="folder cannot be written: no space is left on the disk"):
            replace_folder(mounted / "folder", bytes(1 << 20))
        assert (mounted / "file").read_bytes() == OLD
        assert contents(mounted / "folder") == {OLD}
        assert sorted(os.listdir(mounted)) == ["file", "folder"]
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_a_limit_on_file_sizes_is_one_sentence(tmp_path):
    from conftest import files_below  # here, because the killed writers import this module and need no torch

    write_file(tmp_path / "file", OLD)
    expected = "file cannot be written: the file is larger than"
    with files_below(4096), pytest.raises(UserError, match=expected):
        write_file(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


def test_permissions_are_the_old_ones_or_what_the_umask_leaves(tmp_path, umask):
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    file, folder = tmp_path / "file", tmp_path / "folder"
    write_file(file, OLD)
    replace_folder(folder, OLD)
    assert (mode(file), mode(folder)) == (0o640, 0o750)
    for chosen in (0o664, 0o600, 0o444):
        file.chmod(chosen)
        write_file(file, NEW)
        assert mode(file) == chosen
    folder.chmod(0o711)
    replace_folder(folder, NEW)
    assert mode(folder) == 0o711
    with new_file(file) as temporary:
        temporary.unlink()
        descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600)
        os.close(descriptor)
    assert mode(file) == 0o444


def test_nobody_else_can_look_into_a_temporary_folder(tmp_path):
    with new_file(tmp_path / "file") as temporary:
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700


def test_a_link_to_a_file_or_folder_stays_and_what_it_leads_to_is_replaced(tmp_path):
    real = tmp_path / "real"
    write_file_target, folder_target = real / "file", real / "folder"
    replace_folder(folder_target, OLD)
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(real / name)
    write_file(tmp_path / "file", NEW)
    replace_folder(tmp_path / "folder", NEW)
    assert write_file_target.read_bytes() == NEW
    assert contents(folder_target) == {NEW}
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder"))


def test_other_files_of_an_old_folder_are_kept_when_asked(tmp_path):
    target = tmp_path / "folder"
    replace_folder(target, OLD)
    (target / "notes").mkdir()
    (target / "notes" / "mine.txt").write_text("mine")
    (target / "onnx" / "link").symlink_to("graph.onnx")
    replace_folder(target, NEW, keep_others=True)
    assert (target / "notes" / "mine.txt").read_text() == "mine"
    assert os.readlink(target / "onnx" / "link") == "graph.onnx"
    assert {(target / name).read_bytes() for name in FILES} == {NEW}
    replace_folder(target, OLD)
    assert contents(target) == {OLD}


def test_a_folder_that_may_not_be_replaced_and_a_file_in_the_way_are_one_sentence(tmp_path):
    target = tmp_path / "folder"
    replace_folder(target, OLD)
    for replace in (None, lambda folder: folder != target):
        with (
            pytest.raises(UserError, match="cannot be written: it exists and is not replaced"),
            new_folder(target, replace=replace) as temporary,
        ):
            fill(temporary, NEW)
    assert contents(target) == {OLD}
    write_file(tmp_path / "file", OLD)
    with pytest.raises(UserError, match="file cannot be written: Not a directory"):
        replace_folder(tmp_path / "file", NEW)
    with pytest.raises(UserError, match="folder cannot be written: Is a directory"):
        write_file(target, NEW)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_an_error_about_another_file_names_that_file(tmp_path):
    expected = r"copy cannot be written: .*absent: No such file or directory\."
    with pytest.raises(UserError, match=expected), new_file(tmp_path / "copy") as temporary:
        temporary.write_bytes((tmp_path / "absent").read_bytes())
    assert os.listdir(tmp_path) == []


def test_a_closed_stdout_is_no_error_of_the_file(tmp_path):
    with pytest.raises(BrokenPipeError), new_file(tmp_path / "file"):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_pipe_and_a_device_are_written_directly_or_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file(pipe, b"content")
        assert os.read(reader, 100) == b"content"
    finally:
        os.close(reader)
    program = "from microvlm.atomic import write_file; write_file('/dev/stdout', 'content')"
    process = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert process.stdout == "content"
    with pytest.raises(UserError, match="is a pipe or a device"), new_file(pipe):
        pass
    assert pipe.is_fifo()


def test_a_reader_does_not_bring_back_a_folder_that_was_deleted(tmp_path):
    """After both renames only the old folder is in the leftover: it is removed, not recovered."""
    leftover = tmp_path / ".bundle.new-00000000"
    (leftover / "bundle.replaced").mkdir(parents=True)
    recover(tmp_path / "bundle")
    assert os.listdir(tmp_path) == []


def test_a_name_of_any_length_is_replaced_and_recovered(tmp_path, without_exchange):
    file, folder = tmp_path / ("f" * 255), tmp_path / ("ü" * 127)
    for content in (OLD, NEW):
        write_file(file, content)
        replace_folder(folder, content)
        assert file.read_bytes() == content
        assert contents(folder) == {content}
    label = temporary_folder.label(folder.name)
    leftover = tmp_path / f".{label}.new-00000000"
    fill_new(leftover / folder.name, OLD)
    folder.rename(leftover / f"{label}.replaced")
    recover(folder)
    assert contents(folder) == {OLD}
    assert sorted(os.listdir(tmp_path)) == [file.name, folder.name]


def fill_new(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    fill(folder, content)


def test_a_report_is_written_in_place_where_the_folder_forbids_a_rename(public_folder):
    from conftest import another_user

    report = public_folder / "report.json"
    report.write_bytes(OLD)
    report.chmod(0o666)
    with another_user():
        with pytest.raises(UserError, match=r"report\.json cannot be written: Permission denied"):
            write_file(report, NEW)
        write_file(report, NEW, fallback=True)
        with pytest.raises(UserError, match=r"absent cannot be written: Permission denied"):
            write_file(public_folder / "absent", NEW, fallback=True)
    assert report.read_bytes() == NEW
    assert os.listdir(public_folder) == ["report.json"]


def test_a_report_that_is_mounted_by_itself_is_written_in_place(tmp_path):
    from conftest import mounted

    source, report = tmp_path / "source", tmp_path / "report.json"
    source.write_bytes(OLD)
    report.touch()
    with mounted(report, "--bind", str(source)):
        with pytest.raises(UserError, match="cannot be written: Device or resource busy"):
            write_file(report, NEW)
        write_file(report, NEW, fallback=True)
        assert sorted(os.listdir(tmp_path)) == ["report.json", "source"]
    assert source.read_bytes() == NEW


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_folder_with_a_mount_in_it_is_not_replaced_and_the_mounted_files_stay(tmp_path, kind):
    from conftest import mounted

    target, other = tmp_path / "with blank", tmp_path / "other"
    replace_folder(target, OLD)
    (target / "data").mkdir()
    other.mkdir()
    options = ("-t", "tmpfs", "tmpfs") if kind == "tmpfs" else ("--bind", str(other))
    with mounted(target / "data", *options):
        (target / "data" / "precious").write_text("precious")
        with pytest.raises(UserError, match="something is mounted in it; unmount that"):
            replace_folder(target, NEW)
        assert (target / "data" / "precious").read_text() == "precious"
        assert (target / FILES[0]).read_bytes() == OLD
    assert sorted(os.listdir(tmp_path)) == ["other", "with blank"]


def test_a_leftover_with_a_mount_in_it_is_not_removed(tmp_path):
    from conftest import mounted

    leftover = tmp_path / ".file.new-00000000"
    (leftover / "data").mkdir(parents=True)
    with mounted(leftover / "data", "-t", "tmpfs", "tmpfs"):
        (leftover / "data" / "precious").touch()
        write_file(tmp_path / "file", NEW)
        assert (leftover / "data" / "precious").exists()
    write_file(tmp_path / "file", NEW)
    assert os.listdir(tmp_path) == ["file"]


# As _KILL_EVERYWHERE, for two files in a folder that holds another's: old or new after a look, which finishes them.
_KILL_BETWEEN_FILES = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from microvlm.temporary_folder import recover
from test_atomic import NEW, OLD, INCOMPLETE, NAMES, replace_files

target = Path(sys.argv[2]) / "target"
target.mkdir()
(target / "foreign").write_text("foreign")
before = os.stat(target / "foreign")

def die_at(number):
    def count(event, arguments):
        nonlocal number
        if event.startswith(("os.", "open", "fcntl.", "shutil.", "flush")) and event != "os.kill":
            number -= 1
            if number < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    fsync = os.fsync
    os.fsync = lambda descriptor: (count("flush", ()), fsync(descriptor))
    sys.addaudithook(count)

outcomes, number, killed = set(), 0, True
while killed:
    replace_files(target, OLD)
    process = os.fork()
    if process == 0:
        die_at(number)
        replace_files(target, NEW)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, status
    marked = (target / INCOMPLETE).exists()
    found = {(target / name).read_bytes() for name in NAMES}
    assert marked or len(found) == 1, number
    if len(found) == 2:
        outcomes.add("half")
    recover(target)
    assert not (target / INCOMPLETE).exists()
    (content,) = {(target / name).read_bytes() for name in NAMES}
    assert content == NEW or not marked, number
    outcomes.add("old" if content == OLD else "new")
    replace_files(target, NEW)
    assert sorted(os.listdir(target)) == sorted([*NAMES, "foreign"]), (number, os.listdir(target))
    number += 1
after = os.stat(target / "foreign")
assert (after.st_ino, after.st_ctime_ns, after.st_nlink) == (before.st_ino, before.st_ctime_ns, 1)
assert os.listdir(target.parent) == ["target"]
print(number, *sorted(outcomes))
"""
INCOMPLETE, NAMES = atomic_folder.INCOMPLETE, ("config.json", "weights")


def replace_files(target: Path, content: bytes) -> None:
    with new_files(target, {*NAMES, INCOMPLETE}) as temporary:
        for name in NAMES:
            (temporary / name).write_bytes(content)


def test_killed_between_files_of_a_shared_folder_the_next_look_finishes_them(tmp_path):
    command = [sys.executable, "-P", "-c", _KILL_BETWEEN_FILES, str(Path(__file__).parent), tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    kills, *outcomes = process.stdout.split()
    assert int(kills) > 10
    assert outcomes == ["half", "new", "old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_between_two_files_does_not_part_them(tmp_path, monkeypatch, error):
    target = tmp_path / "folder"
    replace_files(target, OLD)
    (target / "foreign").touch()
    replace, calls = os.replace, []

    def fail_once(source, destination):
        calls.append(destination)
        if calls.count(target / "weights") == 1 and destination == target / "weights":
            raise error(5, "Input/output error")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises((error, UserError)):
        replace_files(target, NEW)
    assert {(target / name).read_bytes() for name in NAMES} == {NEW}
    assert sorted(os.listdir(target)) == ["config.json", "foreign", "weights"]


def test_only_the_marked_temporary_folder_is_moved_into_place(tmp_path):
    target = tmp_path / "folder"
    replace_files(target, OLD)
    (target / INCOMPLETE).write_text(".folder.new-00000000")
    for parent in (tmp_path, target):
        fill_new(parent / ".folder.new-11111111" / "folder", NEW)
    recover(target)
    assert {(target / name).read_bytes() for name in NAMES} == {OLD}
    assert sorted(os.listdir(target)) == sorted([INCOMPLETE, *NAMES])
    fill_new(tmp_path / ".folder.new-00000000" / "folder", NEW)
    recover(target)
    assert (target / "config.json").read_bytes() == NEW
    assert (os.listdir(tmp_path), (target / INCOMPLETE).exists()) == (["folder"], False)


def test_a_folder_of_our_files_alone_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "folder"
    replace_files(target, OLD)
    before = target.stat()
    replace_files(target, NEW)
    assert target.stat().st_ino != before.st_ino
    (target / "foreign").touch()
    before = target.stat()
    replace_files(target, OLD)
    assert target.stat().st_ino == before.st_ino
    assert {(target / name).read_bytes() for name in NAMES} == {OLD}


def test_a_file_that_appears_in_the_moment_of_the_swap_is_kept(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    replace_files(target, OLD)
    exchange = atomic_folder._exchange

    def exchange_late(folder, other):
        (target / "late").write_text("late")
        return exchange(folder, other)

    monkeypatch.setattr(atomic_folder, "_exchange", exchange_late)
    replace_files(target, NEW)
    (target / "late").rename(tmp_path / "late")
    monkeypatch.setattr(atomic_folder, "_exchange", lambda folder, other: (target / "later").touch())
    replace_files(target, OLD)
    assert (tmp_path / "late").read_text() == "late"
    assert sorted(os.listdir(target)) == sorted([*NAMES, "later"])
    assert {(target / name).read_bytes() for name in NAMES} == {OLD}


def test_what_stands_in_a_files_way_stops_the_replacement_before_it_starts(tmp_path):
    replace_files(tmp_path, OLD)
    (tmp_path / "weights").unlink()
    (tmp_path / "weights").mkdir()
    with pytest.raises(UserError, match="weights: Is a directory"):
        replace_files(tmp_path, NEW)
    assert (tmp_path / "config.json").read_bytes() == OLD
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)
