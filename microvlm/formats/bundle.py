"""The files of a bundle: checked when the bundle is opened, and held to that state when one is read or mapped later.

A bundle's weights are mapped, never copied, and a graph is loaded when it is first used. So a file's identity (inode,
size, times of change) is noted before it is hashed, and compared again after it was read or mapped. A file that was
changed or replaced in between is refused; one that is written to while it is mapped is refused before its next use.
Links, permissions and owners may change: where only the time of change of a file's status differs, its hash decides.
Imports neither numpy nor torch.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from microvlm.console import describe_os_error
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.formats.links import leads_into
from microvlm.formats.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from microvlm.formats.onnx_weights import external_locations
from microvlm.temporary_folder import recover

HASH_BELOW_BYTES = 64_000_000
"""Every file of a smaller bundle is hashed on loading; of a larger one the small files only, unless asked for all."""
SMALL_FILE_BYTES = 4_000_000
_PIECE_BYTES = 65_000
"""Of a file that is hashed: larger ones get new pages from the system each time, which costs more than the calls."""
MAX_GRAPH_BYTES = 256_000_000
"""Weights lie outside of the graphs: the largest graph at full size has 300 KB."""
FILES_READ_BY_NAME = (
    "config.json",
    "generation_config.json",
    "memory_prior.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer_tables.safetensors",
)
"""What loading a bundle reads beside its graphs; none of these may be there without being listed."""
TRANSFORMERS_MODULE = "transformers_microvlm.py"
"""Read by transformers alone."""
DOCUMENTS = ("MODEL_CARD.md", "README.md", "example.py", TRANSFORMERS_MODULE)
"""Listed files that nothing here reads: a model's pages are edited, and a program may be removed."""
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_REMEDY = "copy or export the bundle again"
_SEEK_LOCK = threading.Lock()


def is_bundle(directory: str | Path) -> bool:
    """Whether `directory` has a manifest. A bundle's replacement that was cut off is finished first (`recover`)."""
    recover(directory)
    return (Path(directory) / MANIFEST).is_file()


def open_bundle(directory: str | Path, verify: bool | None = None) -> Manifest:
    """Read the manifest and check the bundle's files: see `BundleFiles`, which this is for one look.

    Raises UserError naming the file that is wrong.
    """
    return BundleFiles(directory, verify).manifest


def is_intact(directory: str | Path) -> bool:
    """Whether `directory` is a bundle that `open_bundle` accepts."""
    try:
        return is_bundle(directory) and bool(open_bundle(directory))
    except UserError:
        return False


class Identity(NamedTuple):
    """Facts of the file system about a file, which differ when another file has its name or its content was written."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int
    changed_ns: int


class BundleFiles:
    """The checked files of a bundle.

    All that the manifest lists are there as regular files of the right sizes and, with `verify`, hashes; every data
    file that a graph refers to is among them, and nothing that loading reads by its name is beside them. `verify` None
    checks every hash of a bundle below `HASH_BELOW_BYTES`, and those of graphs and small files in a larger one. Of
    `DOCUMENTS` only those that are there are checked, and only with `verify`. Other files in the folder are not looked
    at. Threads may share an object.

    Raises UserError naming the file that is wrong.
    """

    def __init__(self, directory: str | Path, verify: bool | None = None):
        self.folder = Path(directory)
        self._linked_folders: dict[str, bool] = {}
        self.manifest = read_manifest(self.folder)
        files = self.manifest.files
        for name in FILES_READ_BY_NAME:
            if name not in files and os.path.lexists(self._path(name)):
                raise UserError(
                    f"{self._path(name)} is not in the bundle's {MANIFEST}: remove it, or export the bundle again."
                )
        self._hold_lock = threading.Lock()
        self._held: dict[str, int] = {}
        self._close = weakref.finalize(self, _close_all, self._held)
        self._identities: dict[str, Identity] = {}
        self.data_files: dict[str, tuple[str, ...]] = {}
        """Graph -> the data files that it refers to, by their names in the manifest."""
        graphs = {graph.file for graph in self.manifest.graphs.values()}
        verify_all = verify or (
            verify is None and sum(entry.bytes for entry in files.values()) < HASH_BELOW_BYTES
        )
        for name, entry in files.items():
            if name in DOCUMENTS and not (verify and os.path.lexists(self._path(name))):
                continue
            # Tokenizer and the memory's prior are read whole anyway; only a large bundle's weights are spared.
            hashed = verify_all or (verify is None and (entry.bytes < SMALL_FILE_BYTES or name in graphs))
            if name in graphs:
                self.data_files[name] = self._check_graph(name, entry, hashed)
            else:
                self._check(name, entry, hashed)

    def read(self, name: str, limit: int) -> bytes:
        """The content of a listed file, as it was checked. Raises UserError, also for more than `limit` bytes."""
        self._limit(name, limit)
        if name in self._held:
            with _errors_about(self._path(name)):
                return self._read(name, self._held[name], limit)
        with _opened(self._path(name)) as descriptor:
            return self._read(name, descriptor, limit)

    def keep_open(self, name: str) -> None:
        """Keep a descriptor of a listed file, so that it can be read when the bundle was replaced. Raises UserError.

        Skips a name that is not listed or is kept already.
        """
        with self._hold_lock:
            if name in self._identities and name not in self._held:
                with _opened(self._path(name)) as descriptor:
                    self._require_open(name, descriptor)
                    self._held[name] = os.dup(descriptor)

    def require_unchanged(self, names: Iterable[str]) -> None:
        """Called after files were read by their paths: raise UserError unless those paths lead to what was checked.

        Names that are not listed are skipped.
        """
        for name in names:
            if name in self._identities:
                with _errors_about(self._path(name)):
                    status = os.stat(self._path(name))
                self._require(name, status, lambda name=name, status=status: self._digest_again(name, status))  # type: ignore[misc]

    def hold(self, graph_file: str) -> None:
        """Called after a graph was loaded by its path: raise UserError unless that led to what was checked.

        Keeps descriptors of the data files, which are mapped now, for `require_held_unchanged`.
        """
        self.require_unchanged((graph_file, *self.data_files[graph_file]))
        for name in self.data_files[graph_file]:
            self.keep_open(name)

    def require_held_unchanged(self, graph_file: str) -> None:
        """Raise UserError if a mapped data file of this graph was written to or cut.

        A cut file would end the process by a signal when it is read. A mapped file may have lost its name meanwhile.
        """
        for name in self.data_files[graph_file]:
            descriptor = self._held[name]
            # Before every answer: nothing but the comparison as long as nothing differs.
            if _identity(os.fstat(descriptor)) != self._identities[name]:
                with _errors_about(self._path(name)):
                    self._require_open(name, descriptor)

    def _check(self, name: str, entry: FileEntry, hashed: bool) -> None:
        if not hashed:
            with _errors_about(self._path(name)):
                self._note(name, entry, os.stat(self._path(name)))
            return
        with _opened(self._path(name)) as descriptor:
            self._note(name, entry, os.fstat(descriptor))
            digest = _digest(descriptor)
        self._require_hash(name, digest)

    def _check_graph(self, name: str, entry: FileEntry, hashed: bool) -> tuple[str, ...]:
        """Check a graph -> its data files. Raises UserError for one that the manifest does not list."""
        with _opened(self._path(name)) as descriptor:
            self._note(name, entry, os.fstat(descriptor))
            self._limit(name, MAX_GRAPH_BYTES)
            content = _content(descriptor, entry.bytes)
        if hashed:
            self._require_hash(name, hashlib.sha256(content).hexdigest())
        data_files = []
        for location in sorted(external_locations(content, Path(self._path(name)))):
            data_file = (PurePosixPath(name).parent / location).as_posix()
            if ".." in PurePosixPath(location).parts or data_file not in self.manifest.files:
                raise UserError(
                    f"{self._path(name)} refers to the file {quote(location)}, which the bundle's {MANIFEST} does not "
                    "list: export the bundle again."
                )
            data_files.append(data_file)
        return tuple(data_files)

    def _note(self, name: str, entry: FileEntry, status: os.stat_result) -> None:
        """Note a file's identity, before it is hashed. Raises UserError for a link that leads out of the bundle."""
        if self._is_linked(name) and not leads_into(self._path(name), self.folder):
            raise UserError(
                f"{self._path(name)} is a link to a file outside of the bundle: copy the file itself there (cp -L)."
            )
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{self._path(name)} is no regular file: {_REMEDY}.")
        if status.st_size != entry.bytes:
            raise UserError(
                f"{self._path(name)} has {status.st_size} bytes instead of {entry.bytes}: {_REMEDY}."
            )
        self._identities[name] = _identity(status)

    def _is_linked(self, name: str) -> bool:
        """Whether a file or its folder is a link. Resolving every path would take a tenth of the time of loading."""
        parent = os.path.dirname(name)
        if parent not in self._linked_folders:
            real_folder = os.path.realpath(self.folder)
            self._linked_folders[parent] = os.path.realpath(self._path(parent)) != os.path.join(
                real_folder, *filter(None, parent.split("/"))
            )
        return self._linked_folders[parent] or os.path.islink(self._path(name))

    def _limit(self, name: str, limit: int) -> None:
        if self.manifest.files[name].bytes > limit:
            raise UserError(
                f"{self._path(name)} has more than {limit:,} bytes, too many for what it is: {_REMEDY}."
            )

    def _read(self, name: str, descriptor: int, limit: int) -> bytes:
        content = _content(descriptor, limit)
        self._require(name, os.fstat(descriptor), lambda: hashlib.sha256(content).hexdigest())
        return content

    def _require_open(self, name: str, descriptor: int) -> None:
        self._require(name, os.fstat(descriptor), lambda: _digest(descriptor))

    def _require(self, name: str, status: os.stat_result, digest: Callable[[], str]) -> None:
        """Raise UserError unless a file with `status` is the one that was checked.

        A new link, another owner or other permissions change `changed_ns` alone, and so does whoever writes to the
        file and sets the time of its modification back. So the hash decides then, which `digest` computes, also for
        a file that was not hashed at first.
        """
        noted, identity = self._identities[name], _identity(status)
        if identity == noted:
            return
        if identity._replace(changed_ns=noted.changed_ns) != noted:
            raise self._changed(name)
        if digest() != self.manifest.files[name].sha256:
            raise self._changed(name)
        # As it was before the hash was computed: a change since then will be seen.
        self._identities[name] = identity

    def _digest_again(self, name: str, status: os.stat_result) -> str:
        with _opened(self._path(name)) as descriptor:
            if _identity(os.fstat(descriptor)) != _identity(status):
                raise self._changed(name)
            return _digest(descriptor)

    def _require_hash(self, name: str, digest: str) -> None:
        if digest != self.manifest.files[name].sha256:
            raise UserError(
                f"{self._path(name)} was altered: its hash is not the manifest's; copy or export it again."
            )

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _changed(self, name: str) -> UserError:
        return UserError(
            f"{self._path(name)} was changed or replaced after the bundle was opened: load the bundle again."
        )


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """A descriptor of a file. A pipe in its place is not waited for."""
    with _errors_about(path):
        descriptor = os.open(path, _READ_FLAGS)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _content(descriptor: int, count: int) -> bytes:
    """The first `count` bytes of a file, or all if it has less."""
    content = _read_at(descriptor, count, 0)
    while 0 < len(content) < count:
        more = _read_at(descriptor, count - len(content), len(content))
        if not more:
            break
        content += more
    return content


def _digest(descriptor: int) -> str:
    digest, position = hashlib.sha256(), 0
    while piece := _read_at(descriptor, _PIECE_BYTES, position):
        digest.update(piece)
        position += len(piece)
    return digest.hexdigest()


def _read_at(descriptor: int, count: int, position: int) -> bytes:
    """At most `count` bytes. Threads may read from one descriptor."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, position)
    with _SEEK_LOCK:  # Windows
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.read(descriptor, count)


def _close_all(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


@contextmanager
def _errors_about(path: str) -> Iterator[None]:
    """Turn errors of the file system into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing from the bundle: copy or export it again.") from None
    except OSError as error:
        error.filename = path
        raise UserError(describe_os_error(error)) from None
