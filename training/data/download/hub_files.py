"""Files of a Hugging Face repository, fetched with byte-exact resume and compared with the hub's own hashes.

huggingface_hub talks to the hub, and its HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work. Its own downloads into a folder
begin a file anew after a kill, so that a part file is kept here. A file has its name only when its hash was right.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from microvlm.atomic import flush_file, os_errors_about
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.escaping import printable

PART = ".part"
"""Suffix of a file that is still being fetched."""
_TIMEOUT_S = 20
_CHUNK_BYTES = 1 << 20


class HubUnreachable(UserError):
    """The hub gave no answer, or only a part of one. The text is a clause, to which the caller adds what to do."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository as the hub describes it."""

    name: str
    nbytes: int
    sha256: str | None
    """Of a large file."""
    git_sha1: str | None
    """Git's hash of a small one."""


@dataclass(frozen=True)
class HubListing:
    """The files of a repository at one commit."""

    repository: str
    kind: str
    """`model` or `dataset`."""
    commit: str
    files: tuple[HubFile, ...]


def list_files(
    repository: str, revision: str | None, patterns: tuple[str, ...], kind: str = "model"
) -> HubListing:
    """Ask the hub for the commit that `revision` (None: the newest) means and the files there that match `patterns`.

    Files in sub-folders are left out. Raises HubUnreachable, and UserError for an unknown repository or revision.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=_endpoint()).repo_info(
            repository, repo_type=kind, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
        )
    except Exception as error:  # the client raises a dozen kinds, of two HTTP libraries
        raise _failure(error, repository, revision) from None
    files = tuple(
        HubFile(
            sibling.rfilename,
            sibling.size or 0,
            sibling.lfs.sha256 if sibling.lfs else None,
            sibling.blob_id if not sibling.lfs else None,
        )
        for sibling in getattr(info, "siblings", None) or ()
        if os.path.basename(sibling.rfilename) == sibling.rfilename
        and any(fnmatch(sibling.rfilename, pattern) for pattern in patterns)
    )
    return HubListing(repository, kind, info.sha or "", files)


def fetch_file(listing: HubListing, file: HubFile, folder: Path) -> Path:
    """Fetch one file into `folder`, going on where an earlier attempt stopped -> its path.

    A file that is there already is kept when its size and hash are right, and fetched again otherwise. Raises
    HubUnreachable, and UserError for a file whose hash is wrong; its bytes are then removed.
    """
    target = folder / file.name
    part = target.with_name(file.name + PART)
    with os_errors_about(target):
        if target.is_file():
            if _is_right(target, file):
                return target
            note(f"{target} is not the hub's file, and is fetched again.")
            target.unlink()
        done_bytes = part.stat().st_size if part.is_file() else 0
        if done_bytes > file.nbytes:
            part.unlink()
            done_bytes = 0
        resumed = f", going on at {done_bytes:,}" if done_bytes else ""
        note(f"{listing.repository}: {file.name} ({file.nbytes:,} bytes{resumed})")
        _append(listing, file, part, done_bytes)
        if not _is_right(part, file):
            part.unlink()
            raise UserError(
                f"{file.name} of {listing.repository} has another hash than the hub says, and was removed: run the "
                "same command again."
            )
        flush_file(part)
        os.replace(part, target)
    return target


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _append(listing: HubListing, file: HubFile, part: Path, done_bytes: int) -> None:
    """Fetch the bytes from `done_bytes` on to the end of `part`. What arrived before an error stays."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars

    if sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bars()
    url = hf_hub_url(
        listing.repository, file.name, repo_type=listing.kind, revision=listing.commit, endpoint=_endpoint()
    )
    with part.open("r+b" if part.exists() else "w+b") as stream:
        stream.seek(done_bytes)
        try:
            http_get(
                url,
                stream,
                resume_size=done_bytes,
                headers=build_hf_headers(),
                expected_size=file.nbytes,
                displayed_filename=file.name,
            )
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                raise  # of the disk, such as one that is full
            raise _failure(error, listing.repository, listing.commit, file.name) from None


def _endpoint() -> str | None:
    """The hub's address, which the environment may change; None: the public one."""
    return os.environ.get("HF_ENDPOINT") or None


def _is_right(path: Path, file: HubFile) -> bool:
    """Whether a file has the size and the hash that the hub states for it."""
    if path.stat().st_size != file.nbytes:
        return False
    if file.sha256 is not None:
        return hash_file(path) == file.sha256
    if file.git_sha1 is not None:
        content = path.read_bytes()  # Git keeps small files only
        return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest() == file.git_sha1
    return True


def _failure(error: Exception, repository: str, revision: str | None, name: str = "") -> UserError:
    """What went wrong at the hub, in one sentence."""
    kind = type(error).__name__
    what = f"{name} of {repository}" if name else repository
    if kind in ("RepositoryNotFoundError", "GatedRepoError"):
        return UserError(
            f"the hub shows no repository '{repository}' to you: check the name, or log in to the hub."
        )
    if kind == "RevisionNotFoundError":
        return UserError(f"{repository} has no revision '{revision}': give another --revision.")
    if kind == "EntryNotFoundError" or kind == "RemoteEntryNotFoundError":
        return UserError(f"{what} is no longer there: give another --revision.")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return HubUnreachable(f"the hub answers {status} for {what}")
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return HubUnreachable(f"{what} arrived incomplete, and the next run goes on there")
    reason = printable(str(error).splitlines()[0][:120]) if str(error) else kind
    return HubUnreachable(f"the hub cannot be reached for {what} ({reason})")
