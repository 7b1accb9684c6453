"""Finds a pretrained part: the folder or hub id of an encoder or a decoder, or a GGUF file. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from microvlm.config import CONFIG, MicroVLMConfig, TextConfig, VisionConfig
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats.documents import quote
from microvlm.formats.headers.gguf_header import SUFFIX, GgufHeader, is_gguf, read_gguf_header
from microvlm.formats.manifest import MANIFEST
from microvlm.model.pretrained.gguf_config import gguf_text_config
from microvlm.model.pretrained.hf_config import DECODERS, ENCODERS, model_type, text_config, vision_config
from microvlm.sources.foreign_models import OURS, foreign_type
from microvlm.sources.model_source import BUNDLED, find_documents, find_part_folder

Role: TypeAlias = Literal["vision", "decoder"]


@dataclass(frozen=True)
class Part:
    """An encoder or a decoder."""

    given: str
    """What the user gave."""
    role: Role
    family: str
    """`model_type` of a Hugging Face folder, the architecture of a GGUF file."""
    folder: Path
    """The folder, or that of the file."""
    gguf: GgufHeader | None = None

    @property
    def name(self) -> str:
        """A short name: the last part of what the user gave."""
        name = Path(os.path.abspath(self.given)).name
        return printable(name.removesuffix(SUFFIX))[:80]

    @property
    def files(self) -> Path | GgufHeader:
        """Where the tokenizer is: the folder, or the file's header."""
        return self.folder if self.gguf is None else self.gguf

    def text_config(self, sub_norm: bool = False) -> TextConfig:
        """The configuration of a decoder. Raises UserError."""
        if self.gguf is not None:
            return gguf_text_config(self.gguf, sub_norm)
        return text_config(self.folder, sub_norm)

    def vision_config(self) -> VisionConfig:
        """The configuration of an encoder. Raises UserError."""
        return MicroVLMConfig.load(self.folder).vision if self.family == OURS else vision_config(self.folder)


def find_part(source: str | os.PathLike[str] | Part, role: Role | None = None) -> Part:
    """The encoder or decoder that `source` means: the one that `role` asks for, if it does. Raises UserError."""
    part = source if isinstance(source, Part) else _find(source, role=role)
    if role is not None and part.role != role:
        raise UserError(
            f"{printable(part.given)} is {_article(part)}: give it as --{part.role}, "
            f"and {'an encoder' if role == 'vision' else 'a decoder'} as --{role}."
        )
    return part


def part_of(source: str | os.PathLike[str]) -> Part | None:
    """The encoder or decoder that `source` means; None for anything else, such as a whole MicroVLM.

    Of a hub id only documents are fetched. Raises UserError.
    """
    if isinstance(source, str) and source in BUNDLED:
        return None
    path = Path(source)
    if not (path.is_file() and is_gguf(path)):
        folder = find_documents(source)
        has_documents = (folder / CONFIG).is_file() or (folder / MANIFEST).is_file()
        if has_documents and foreign_type(folder) is None:
            return None
        if not has_documents and not any(folder.glob(f"*{SUFFIX}")):
            return None
    return _find(source, find_documents)


def _find(
    source: str | os.PathLike[str],
    find: Callable[[str | os.PathLike[str]], Path] = find_part_folder,
    role: Role | None = None,
) -> Part:
    path = Path(source)
    if path.is_file() and is_gguf(path):
        return _gguf_part(os.fspath(source), path)
    folder = find(source)
    if not (folder / CONFIG).is_file():
        files = sorted(folder.glob(f"*{SUFFIX}"))
        if len(files) == 1:
            return _gguf_part(os.fspath(source), files[0])
        if files:
            raise UserError(f"{folder} holds {len(files)} GGUF files: give one of them, such as {files[0]}.")
    family = model_type(folder)
    if family == OURS and role == "vision":
        return Part(os.fspath(source), "vision", OURS, folder)
    if family == OURS:
        raise UserError(
            f"{folder} is a whole MicroVLM: give it to microvlm caption, train it, or give it as --vision for its "
            "encoder alone."
        )
    if family in ENCODERS:
        return Part(os.fspath(source), "vision", family, folder)
    if family in DECODERS:
        return Part(os.fspath(source), "decoder", family, folder)
    raise UserError(
        f"{folder / CONFIG}: {quote(family)} models are not supported; take a ViT or DeiT encoder, or a Qwen2, Llama "
        "or BitNet decoder."
    )


def _gguf_part(given: str, path: Path) -> Part:
    header = read_gguf_header(path)
    family = str(header.metadata.get("general.architecture"))
    return Part(given, "decoder", family, path.parent, header)


def _article(part: Part) -> str:
    return f"an encoder ({part.family})" if part.role == "vision" else f"a decoder ({part.family})"
