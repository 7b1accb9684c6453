"""A file that is not this version's whole native library for this machine is told in a sentence and never loaded."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from microvlm.backends import native
from microvlm.backends.native.library_file import SEAL_BYTES, library_problem
from microvlm.errors import UserError

PAGE = 4096
MUTANTS = 500

pytestmark = [pytest.mark.native, pytest.mark.linux]

IN_A_CHILD = """
import os, random, sys
from pathlib import Path
from microvlm.backends import native
from microvlm.errors import UserError
content = Path(sys.argv[1]).read_bytes()
path = Path(sys.argv[2])
kind, count = sys.argv[3], int(sys.argv[4])
os.environ[native.SWITCH] = str(path)
rng = random.Random(20260)
section_headers = int.from_bytes(content[40:48], "little")
headers = [*range(64 + 56 * content[56]), *range(section_headers, section_headers + 64 * content[60])]
for number in range(count):
    changed = bytearray(content)
    if kind == "cut":
        del changed[number * 4096 :]
    else:
        for _ in range(rng.randint(1, 3)):
            changed[rng.choice(headers)] ^= 1 << rng.randrange(8)
    path.unlink(missing_ok=True)
    path.write_bytes(changed)
    try:
        native.library_path()
        print("loaded", number)
    except UserError as error:
        print(error)
"""


def loaded_file() -> Path:
    """A library that is not ours: the C library of this process."""
    maps = Path("/proc/self/maps").read_text()
    return Path(re.findall(r"/\S*libc[.-]\S*so\S*", maps)[0])


def compile_library(source: str, path: Path, compiler: str = "c++") -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    path.with_suffix(".cpp").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, path.with_suffix(".cpp")], check=True)
    return path


def seal(path: Path) -> Path:
    """What `seal.cmake` does."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    path.write_bytes(content + f"\nMicroVLM library sealed with sha256 {digest}\n".encode())
    return path


EXPORTS = 'extern "C" { void RegisterCustomOps() {} void microvlm_active_variant() {} }\n'


def refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(native.SWITCH, str(path))
    with pytest.raises(UserError) as error:
        native.library_path()
    sentence = str(error.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def test_the_built_library_is_sealed_with_its_own_hash(native_library, tmp_path):
    assert library_problem(native_library) == ""
    content = native_library.read_bytes()
    stripped = tmp_path / "stripped.so"
    stripped.write_bytes(content[:-SEAL_BYTES])
    assert seal(stripped).read_bytes() == content


def test_what_is_no_library_is_refused_with_the_reason(native_library, tmp_path, monkeypatch):
    path = tmp_path / native.LIBRARY
    content = native_library.read_bytes()
    contents = {
        b"": "it is empty",
        b"not a library": "it is not a library of Linux",
        b"\x7fELF": "it is not a library of Linux",
        loaded_file().read_bytes(): "it is not a library of MicroVLM",
        content[:100_000]: "only the beginning of one|its end is missing",
        content[:-1]: "its end is missing",
        content + b"\n": "its end is missing",
        content[:-SEAL_BYTES]: "its end is missing, or another version",
        content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]: "it is damaged",
    }
    for number, (wrong, reason) in enumerate(contents.items()):
        path = tmp_path / f"{number}.so"
        path.write_bytes(wrong)
        assert re.search(reason, refusal(path, monkeypatch)), number
        assert "cannot be loaded" in refusal(path, monkeypatch)
    assert "neither 0 nor a library" in refusal(tmp_path, monkeypatch)
    assert "neither 0 nor a library" in refusal(tmp_path / "missing.so", monkeypatch)
    assert "neither 0 nor a library" in refusal(Path("x" * 5000), monkeypatch)
    os.mkfifo(tmp_path / "pipe.so")
    assert "neither 0 nor a library" in refusal(tmp_path / "pipe.so", monkeypatch)


def test_a_replaced_file_is_looked_at_again(native_library, tmp_path, monkeypatch):
    path = tmp_path / native.LIBRARY
    path.write_bytes(b"not a library")
    refusal(path, monkeypatch)
    shutil.copyfile(native_library, path)
    assert native.library_path() == path
    assert native.variants()[-1] == "reference"


def test_a_library_for_another_machine_names_both(native_library, tmp_path, monkeypatch):
    content = bytearray(native_library.read_bytes())
    others = {"x86_64": (183, "aarch64"), "aarch64": (62, "x86_64")}
    number, name = others[platform.machine()]
    content[18:20] = number.to_bytes(2, "little")
    path = tmp_path / native.LIBRARY
    path.write_bytes(content)
    assert f"it is for {name}, and this is {platform.machine()}" in refusal(path, monkeypatch)


def test_a_cross_compiled_library_is_refused(tmp_path, monkeypatch):
    if platform.machine() != "x86_64":
        pytest.skip("cross-compiles for aarch64")
    path = seal(compile_library(EXPORTS, tmp_path / "arm.so", "aarch64-linux-gnu-g++"))
    assert "it is for aarch64" in refusal(path, monkeypatch)


def test_a_foreign_library_s_code_does_not_run(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    source = f'#include <cstdio>\nstatic int ran = (std::fclose(std::fopen("{mark}", "w")), 1);\n'
    path = compile_library(source, tmp_path / "foreign.so")
    assert "it is not a library of MicroVLM" in refusal(path, monkeypatch)
    assert not mark.exists()


@pytest.mark.parametrize("interface", ["", 'extern "C" long microvlm_interface() { return 1; }'])
def test_a_library_of_another_version_is_refused(interface, tmp_path, monkeypatch):
    path = seal(compile_library(EXPORTS + interface, tmp_path / "old.so"))
    assert "another version of MicroVLM" in refusal(path, monkeypatch)


def test_a_file_that_may_not_be_read_is_refused(native_library):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from microvlm.backends.native.library_file import library_problem\n"
        "os.getuid() or os.setuid(65534)\n"
        "print(library_problem(Path(sys.argv[1])))"
    )
    # The folders above belong to the user who runs the tests.
    public = Path("/dev/shm") / f"microvlm-test-{os.getpid()}.so"
    shutil.copyfile(native_library, public)
    public.chmod(0)
    try:
        result = subprocess.run([sys.executable, "-c", code, public], capture_output=True, text=True)
    finally:
        public.unlink()
    assert result.stdout.strip() == f"{public}: Permission denied", result.stderr


@pytest.mark.parametrize("kind", ["cut", "flipped"])
def test_no_damage_ends_the_process(kind, native_library, tmp_path):
    """Cut at every page, and with bits of the ELF, program and section headers flipped."""
    count = MUTANTS if kind == "flipped" else native_library.stat().st_size // PAGE + 1
    arguments = [native_library, tmp_path / "mutant.so", kind, count]
    result = subprocess.run(
        [sys.executable, "-c", IN_A_CHILD, *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    sentences = result.stdout.splitlines()
    assert len(sentences) == count
    assert not [line for line in sentences if line.startswith("loaded")]
    assert all(line.startswith("the native library ") and line.endswith(".") for line in sentences)


@pytest.mark.parametrize("what", ["foreign", "cut"])
@pytest.mark.parametrize("command", ["info", "caption"])
def test_commands_end_with_one_sentence_and_status_2(
    what, command, native_library, speaking_bundle, tmp_path, monkeypatch
):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    path = tmp_path / "t.so"
    path.write_bytes(
        loaded_file().read_bytes() if what == "foreign" else native_library.read_bytes()[:100_000]
    )
    monkeypatch.setenv(native.SWITCH, str(path))
    arguments = [speaking_bundle] if command == "info" else [tmp_path / "red.png", "--model", speaking_bundle]
    program = [sys.executable, "-c", "from microvlm.commands.main import main; main()", command]
    result = subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert "cannot be loaded" in result.stderr
