"""What is compared: the programs that can read the given files, each with the bits that it reads. Measures nothing."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from microvlm.bench.full.random_bundle import PRESET, random_full_bundle
from microvlm.bench.peers.peer_turns import Contender, file_name
from microvlm.bench.peers.random_gguf import KINDS, random_gguf
from microvlm.bench.speed.harness import Progress
from microvlm.bench.speed.speed_bench import bytes_read_per_token
from microvlm.config import MicroVLMConfig, TextConfig
from microvlm.errors import UserError
from microvlm.formats.bundle import open_bundle
from microvlm.formats.headers.gguf_header import GgufHeader, read_gguf_header
from microvlm.formats.manifest import Manifest
from microvlm.presets import preset
from microvlm.sources.model_source import find_model

_TORCH = (("float32", False), ("bfloat16", False), ("bfloat16", True))
"""(type of the products' weights, whether layers are compiled). Compiling takes minutes, so it has one type."""
_NO_GGUF = "the package gguf is not installed: pip install gguf."
_TABLE = "token_embd.weight"
_GENAI_CONFIG = "genai_config.json"
"""Of a bundle that was exported with --genai."""


def given_contenders(
    models: Sequence[str], ggufs: Sequence[str], checkpoint: str | None, compiled: bool, progress: Progress
) -> tuple[list[Contender], MicroVLMConfig, Path]:
    """Bundles, GGUF files and a float checkpoint of one shape -> (contenders, the first bundle's shape, that bundle).

    Raises UserError for files that are not what they should be, and for bundles of another shape than the first.
    """
    folders = [find_model(model, "bundle").folder for model in models]
    contenders: list[Contender] = []
    config = MicroVLMConfig.load(folders[0])
    for folder in folders:
        require_shape(folder, MicroVLMConfig.load(folder).text, config.text)
        contenders += _of_bundle(folder)
    contenders += [_llama_cpp(gguf, config.text, progress) for gguf in ggufs]
    if checkpoint is not None:
        folder = find_model(checkpoint, "checkpoint").folder
        require_shape(folder, MicroVLMConfig.load(folder).text, config.text)
        contenders += _of_torch(str(folder), file_name(folder), None, compiled)
    return _distinct(contenders), config, folders[0]


def random_contenders(compiled: bool, progress: Progress) -> tuple[list[Contender], MicroVLMConfig, Path]:
    """The full size with random weights: our bundle, GGUF files written once, and PyTorch. Raises UserError."""
    bundle, config = random_full_bundle(progress), preset(PRESET)
    contenders = _of_bundle(bundle)
    contenders += [_llama_cpp(kind, config.text, progress) for kind in KINDS]
    return [*contenders, *_of_torch(None, "random weights", PRESET, compiled)], config, bundle


def _distinct(contenders: Sequence[Contender]) -> list[Contender]:
    """The same, where several have one name with the file's behind it. Raises UserError for what is given twice."""
    names = Counter(contender.name for contender in contenders)
    renamed = [
        replace(contender, name=f"{contender.name}, {contender.file}")
        if names[contender.name] > 1
        else contender
        for contender in contenders
    ]
    twice = next((name for name, count in Counter(each.name for each in renamed).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice: give every bundle and every file once.")
    return renamed


def require_shape(path: Path, found: TextConfig, expected: TextConfig) -> None:
    """Raise UserError unless layers and widths are those of the first bundle."""
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"):
        if getattr(found, name) != getattr(expected, name):
            raise UserError(
                f"{path} has {name} {getattr(found, name)} and the first bundle {getattr(expected, name)}: "
                "give models of one shape."
            )


def _of_bundle(folder: Path) -> list[Contender]:
    manifest = open_bundle(folder)
    ours, bits = manifest.lowering == "custom", _bits_of(manifest)
    name, read = file_name(folder), bytes_read_per_token(folder)
    short = f"{manifest.bits:g} bits"
    program = "MicroVLM" if ours else "ONNX Runtime"
    suffix = "" if ours else f", {manifest.lowering}"
    options: dict[str, Any] = {"file": str(folder), "lowering": manifest.lowering}
    contenders = [Contender(f"{program}, {short}{suffix}", "bundle", bits, name, options, read, ours)]
    if _GENAI_CONFIG in manifest.files:
        vocabulary = MicroVLMConfig.load(folder).text.vocab_size
        options = {"file": str(folder.resolve()), "native": ours, "vocabulary": vocabulary}
        operators = ", our operators" if ours else suffix
        contenders.append(
            Contender(f"onnxruntime-genai, {short}{operators}", "genai", bits, name, options, read)
        )
    return contenders


def _bits_of(manifest: Manifest) -> str:
    return f"{manifest.bits:g} bits, token table {manifest.embedding_bits:g}"


def _llama_cpp(gguf: str, text: TextConfig, progress: Progress) -> Contender:
    """Of a GGUF file, or of a type in `KINDS` for random weights. Raises UserError."""
    if gguf not in KINDS and not Path(gguf).is_file():
        raise UserError(f"{gguf} does not exist: give a GGUF file, or {', '.join(KINDS)} for random weights.")
    if importlib.util.find_spec("gguf") is None:
        shown = gguf if gguf in KINDS else file_name(Path(gguf))
        return Contender(f"llama.cpp, {shown}", "llama.cpp", "-", "-", {}, missing=_NO_GGUF)
    return _of_gguf(random_gguf(text, gguf, progress) if gguf in KINDS else Path(gguf), text)


def _of_gguf(path: Path, text: TextConfig) -> Contender:
    """Raises UserError for a file that is none, or of another shape."""
    header = read_gguf_header(path)
    table = header.tensors.get(_TABLE)
    layers = sum(name.endswith(".ffn_down.weight") for name in header.tensors)
    if table is None or (layers, table.shape[-1]) != (text.num_hidden_layers, text.hidden_size):
        raise UserError(
            f"{path} is not a decoder of {text.num_hidden_layers} layers of width {text.hidden_size}, as the first "
            "bundle is: give models of one shape."
        )
    kinds = _types(header)
    options = {"file": str(path), "vocabulary": table.shape[0]}
    return Contender(
        f"llama.cpp, {' and '.join(kinds)}",
        "llama.cpp",
        f"{' and '.join(kinds)}, token table {table.type.name}",
        file_name(path),
        options,
        gguf_bytes_per_token(header),
    )


def _types(header: GgufHeader) -> list[str]:
    """Types of the layers' matrices, the rarest in bytes last; one with less than a hundredth is left out."""
    sizes: Counter[str] = Counter()
    for name, tensor in header.tensors.items():
        if len(tensor.shape) == 2 and name.startswith("blk."):
            sizes[tensor.type.name] += tensor.nbytes
    return [kind for kind, size in sizes.most_common() if size > 0.01 * sizes.total()]


def gguf_bytes_per_token(header: GgufHeader) -> int:
    """Bytes of weights that a decoded token reads: all, but of an untied token table, of which it needs a row."""
    unread = _TABLE if "output.weight" in header.tensors else ""
    return sum(tensor.nbytes for name, tensor in header.tensors.items() if name != unread)


def _of_torch(file: str | None, name: str, preset_name: str | None, compiled: bool) -> list[Contender]:
    contenders = []
    for dtype, compiles in _TORCH:
        if compiled or not compiles:
            options = {"file": file, "preset_name": preset_name, "dtype": dtype, "compiled": compiles}
            label = f"PyTorch {'compiled' if compiles else 'eager'}, {dtype}"
            contenders.append(Contender(label, "torch", dtype, name, options))
    return contenders
