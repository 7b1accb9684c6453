"""Builds the native library into the package where a C++ compiler is, and says so where none is; pyproject.toml
holds everything else.

MICROVLM_BUILD_NATIVE=0 builds no library (an editable install keeps the one that the checkout has), 1 makes its absence
an error; unset, the package then runs on the operators' function bodies. CXX, CMAKE_TOOLCHAIN_FILE, CMAKE_ARGS and
CMAKE_GENERATOR mean what they mean to CMake.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.install import install

SOURCE = Path("microvlm", "backends", "native")
LIBRARY = "libmicrovlm_ops.so"
REASON = "not_built.txt"
"""Lies in the package in place of the library: one line, which the loader shows."""
COMPILERS = ("c++", "g++", "clang++")
CMAKE_OLDEST = (3, 20)
SWITCH = "MICROVLM_BUILD_NATIVE"


LINKED = ("exporters", "backends", "bench", "training")
"""Top-level folders that links in microvlm/ make its sub-packages."""
CARD = Path("microvlm", "checkpoints", "photo", "MODEL_CARD.md")
"""A link to a page of docs/, which a wheel carries as a file."""
CARD_TARGET = Path("..", "..", "..", "docs", "model-card.md")


def restore_links() -> None:
    """Make the links in microvlm/ where Git checked them out as text files, as it does on Windows by default."""
    for name in LINKED:
        link = Path("microvlm", name)
        if link.is_dir():  # the link, or the folder of a source distribution
            continue
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(Path("..", name), target_is_directory=True)
        except OSError:
            if sys.platform != "win32":
                raise
            # Symbolic links need a privilege there, junctions do not.
            import _winapi

            _winapi.CreateJunction(str(Path(name).resolve()), str(link.absolute()))


def restore_card() -> None:
    """Make the link to the model card where Git checked it out as a text file, or copy the page where links need a
    privilege. A source distribution has the page itself."""
    if CARD.is_symlink() or not CARD.is_file() or CARD.read_text(encoding="utf-8") != CARD_TARGET.as_posix():
        return
    CARD.unlink()
    try:
        CARD.symlink_to(CARD_TARGET)
    except OSError:
        shutil.copyfile(CARD.parent / CARD_TARGET, CARD)


class CannotBuild(Exception):
    """The reason why no library was built, in a few words."""


def native_setting() -> bool | None:
    """True: required. False: left out. None: where it can be built."""
    value = os.environ.get(SWITCH, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{SWITCH} is '{value}'; give 0 (leave the native library out) or 1 (require it).")
    return bool(int(value)) if value else None


def find_compiler() -> str | None:
    """The C++ compiler that CMake would take, or the toolchain file that names it."""
    toolchain = os.environ.get("CMAKE_TOOLCHAIN_FILE")
    if toolchain:
        return toolchain
    candidates = shlex.split(os.environ.get("CXX", ""))[:1] or COMPILERS
    return next((name for name in candidates if shutil.which(name)), None)


def find_program(name: str) -> str | None:
    """Find a program on the path, or beside this Python, where a wheel puts it."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def find_cmake() -> str | None:
    """A CMake that is new enough."""
    program = find_program("cmake")
    if program is None:
        return None
    output = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"(\d+)\.(\d+)", output)
    return program if version and (int(version[1]), int(version[2])) >= CMAKE_OLDEST else None


def build_tools() -> list[str]:
    """Packages that a build needs beside the compiler. A build front end installs them first; the system's are taken
    where they are, which spares the download."""
    if native_setting() is False or find_compiler() is None:
        return []
    tools = [] if find_cmake() else [f"cmake>={'.'.join(map(str, CMAKE_OLDEST))}"]
    return tools if find_program("make") or find_program("ninja") else [*tools, "ninja"]


def run_cmake(*arguments: str) -> None:
    """Raises CannotBuild with the first error of CMake or the compiler; their whole output goes to the log."""
    process = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    print(process.stdout, flush=True)
    if process.returncode:
        lines = [line.strip() for line in process.stdout.splitlines() if line.strip()]
        # CMake's own error is a heading, with the sentence on the line after it.
        first = next(
            (n for n, line in enumerate(lines) if re.search(r"\berror\b", line, re.I)), len(lines) - 1
        )
        raise CannotBuild("the build failed: " + " ".join(lines[first : first + 2])[:300])


def compile_library(destination: Path) -> None:
    """Raises CannotBuild. A fresh build folder each time: a kept one would remember another compiler."""
    if native_setting() is False:
        raise CannotBuild(f"it was left out with {SWITCH}=0")
    if find_compiler() is None:
        raise CannotBuild("no C++ compiler was found when the package was built")
    cmake = find_cmake()
    if cmake is None:
        raise CannotBuild(f"no CMake of {'.'.join(map(str, CMAKE_OLDEST))} or newer was found")
    with tempfile.TemporaryDirectory() as folder:
        options = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={folder}/installed"]
        options += ["-DCMAKE_SHARED_LINKER_FLAGS=-s"]
        if find_program("ninja") and "CMAKE_GENERATOR" not in os.environ:
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}"]
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        run_cmake(cmake, "-S", str(SOURCE), "-B", f"{folder}/build", *options)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(min(4, os.cpu_count() or 1)))
        run_cmake(cmake, "--build", f"{folder}/build", "--config", "Release", "--parallel", jobs)
        run_cmake(cmake, "--install", f"{folder}/build", "--config", "Release")
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a program that has the old file mapped keeps it.
        aside = destination.with_name(f".{LIBRARY}.{os.getpid()}")
        shutil.copyfile(Path(folder, "installed", LIBRARY), aside)
        os.replace(aside, destination)


def compile_library_or_say_why(destination: Path) -> None:
    """`compile_library` with what the system refuses (a full disk, a tool that does not start) as CannotBuild."""
    try:
        compile_library(destination)
    except OSError as error:
        raise CannotBuild(f"the build failed: {error}") from None


class BuildNative(Command):
    """A step of `build`: the library, or the reason for its absence; an editable install has it in the sources."""

    user_options: ClassVar[list] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        library, reason = self.folder() / LIBRARY, self.folder() / REASON
        if self.editable_mode and native_setting() is False and library.is_file():
            # Another environment's editable install uses the library of this checkout.
            return
        # What an earlier build left here must not get into a wheel that says it has none.
        for path in (library, reason):
            path.unlink(missing_ok=True)
        try:
            compile_library_or_say_why(library)
            print(f"microvlm: native library built: {library.stat().st_size} bytes", flush=True)
        except CannotBuild as error:
            if native_setting():
                raise SystemExit(f"microvlm: {SWITCH}=1, but there is no native library: {error}.") from None
            print(
                f"microvlm: no native library: {error}; the package runs on the function bodies.", flush=True
            )
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{error}\n")

    def folder(self) -> Path:
        assert self.build_lib is not None
        return SOURCE if self.editable_mode else Path(self.build_lib, SOURCE)

    def built(self) -> bool:
        return (self.folder() / LIBRARY).is_file()

    def get_outputs(self) -> list[str]:
        assert self.build_lib is not None
        return [
            str(Path(self.build_lib, SOURCE, name))
            for name in (LIBRARY, REASON)
            if (self.folder() / name).is_file()
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {
            output: str(SOURCE / Path(output).name) for output in self.get_outputs() if self.editable_mode
        }

    def get_source_files(self) -> list[str]:
        paths = [path for suffix in (".cpp", ".h", ".cmake") for path in SOURCE.rglob(f"*{suffix}")]
        return sorted(map(str, [*paths, *SOURCE.rglob("CMakeLists.txt")]))


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class Install(install):
    def finalize_options(self) -> None:
        super().finalize_options()
        if self.get_finalized_command("build_native").built():
            # As for a package with an extension module.
            self.install_lib = self.install_platlib


class BdistWheel(bdist_wheel):
    """The library is loaded by ONNX Runtime, not by Python: one wheel a platform serves every Python."""

    def run(self) -> None:
        self.run_command("build_native")
        self.root_is_pure = not self.get_finalized_command("build_native").built()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform = "any" if self.root_is_pure else super().get_tag()[2]
        return "py3", "none", platform


restore_links()
restore_card()
setup(
    cmdclass={"build": Build, "build_native": BuildNative, "install": Install, "bdist_wheel": BdistWheel},
    setup_requires=build_tools(),
)
