"""The C++ compiler of the ziglang wheel behind GCC's names of Arm architectures: it takes CPUs only, as in -mcpu."""

import re
import subprocess
import sys

MARCH = re.compile(r"-march=armv8(?:\.(\d))?-a((?:\+\w+)*)")
LLVM_NAMES = {"fp16": "fullfp16"}


def translate(argument: str) -> str:
    """`-march=armv8.2-a+dotprod` -> `-mcpu=generic+v8_2a+dotprod`; anything else is left alone."""
    match = MARCH.fullmatch(argument)
    if match is None:
        return argument
    version = [f"v8_{match[1]}a"] if match[1] else []
    features = [LLVM_NAMES.get(name, name) for name in match[2].split("+")[1:]]
    return "+".join(["-mcpu=generic", *version, *features])


if __name__ == "__main__":
    arguments = [translate(argument) for argument in sys.argv[1:]]
    if not {"-c", "-E"} & set(arguments):
        # The library needs no C++ runtime: this proves it, and spares the minute in which zig compiles its own.
        arguments.append("-nostdlib++")
    sys.exit(subprocess.run([sys.executable, "-m", "ziglang", "c++", *arguments]).returncode)
