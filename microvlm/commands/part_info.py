"""`microvlm info` of an encoder or a decoder of other makers: dimensions, exact parameters, sizes at each width.

Reads configurations and headers, and needs no torch. Parameters follow from the configuration; the sizes are those
that an export of an assembled model gives the part, computed from the table of operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats.headers.safetensors_header import read_header
from microvlm.formats.op_spec import OpSpec
from microvlm.formats.op_table import MATMUL_BY_KIND, MATMUL_BY_PACKING
from microvlm.formats.weight_format import WeightFormat
from microvlm.sources.foreign_models import assembly
from microvlm.sources.model_source import INDEX, PICKLED, PICKLED_INDEX, WEIGHTS

if TYPE_CHECKING:
    from microvlm.config import MicroVLMConfig
    from microvlm.model.pretrained.parts import Part

WIDTHS = (16, 8, 4, 1.58)
"""Values of --bits."""
_HALF, _FLOAT = 2, 4
"""Bytes of a float16 and of a float32."""


def describe_part(part: Part) -> dict[str, Any]:
    """The document of `microvlm info --json` for a part. Raises UserError for one that cannot be assembled."""
    config = _whole_config(part)
    shapes = _shapes(config, part)
    linears = {name: shape for name, shape in shapes.items() if _is_linear(name, shape)}
    embedding = shapes.get("embedding.weight", ())
    rest = "biases_norms_and_positions" if part.role == "vision" else "biases_and_norms"
    counts = {
        "embedding": prod(embedding) if embedding else 0,
        "linears": sum(map(prod, linears.values())),
        rest: sum(prod(shape) for name, shape in shapes.items() if not _is_matrix(name, shape)),
        "total": sum(map(prod, shapes.values())),
    }
    return {
        "model": part.given,
        "name": part.name,
        "kind": "encoder" if part.role == "vision" else "decoder",
        "family": part.family,
        "dimensions": _dimensions(config, part),
        "parameters": counts,
        "stored": _stored(part),
        "megabytes": {f"{width:g}": _megabytes(shapes, width, part) for width in WIDTHS},
        "embedding_bits": {f"{width:g}": embedding_bits(width) for width in WIDTHS} if embedding else None,
        "next": assembly(part.given, "DECODER") if part.role == "vision" else assembly("ENCODER", part.given),
    }


def format_part(document: dict[str, Any]) -> str:
    """The document of `describe_part` for people."""
    dimensions = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in document["dimensions"].items()
    )
    lines = [f"{printable(document['name'])}: {document['kind']} ({document['family']})", dimensions, ""]
    lines += [
        f"{key.replace('_', ' '):<27}{value:>14,} parameters"
        for key, value in document["parameters"].items()
        if value
    ]
    stored = document["stored"]
    kinds = ", ".join(f"{kind} ({count})" for kind, count in stored["tensors"].items())
    lines += [
        "",
        f"files of {stored['bytes'] / 1e6:,.1f} MB" + (f", tensors in {kinds}" if kinds else ""),
        "",
    ]
    embedding = document["embedding_bits"]
    lines.append(f"{'bits':<8}{'MB exported':>14}" + ("   embedding at" if embedding else ""))
    for width, size in document["megabytes"].items():
        note = f"   {embedding[width]} bits" if embedding else ""
        lines.append(f"{width:<8}{size:>14.1f}{note}")
    if document["kind"] == "encoder":
        lines.append("Below 8 bits an encoder stays at 8.")
    else:
        lines.append("1.58 bits are stored in 2, and need training: rounding alone destroys a model.")
    return "\n".join([*lines, "", f"next: {document['next']}"])


def embedding_bits(width: float) -> int:
    """Bits of a decoder's token table beside linears of this width: --embedding-bits as it would be chosen for it."""
    return 8 if width == 1.58 else int(width)


def _whole_config(part: Part) -> MicroVLMConfig:
    """A configuration that this part fits, with the least of everything else."""
    from microvlm.config import MemoryConfig, MicroVLMConfig, TextConfig, VisionConfig

    return MicroVLMConfig(
        vision=part.vision_config() if part.role == "vision" else VisionConfig(),
        text=part.text_config() if part.role == "decoder" else TextConfig(),
        memory=MemoryConfig(slots=1, code_size=2),
        prefix_tokens=1,
    )


def _shapes(config: MicroVLMConfig, part: Part) -> dict[str, tuple[int, ...]]:
    from microvlm.formats.weight_shapes import weight_shapes

    prefixes = ("vision.",) if part.role == "vision" else ("decoder.", "embedding.")
    return {name: shape for name, shape in weight_shapes(config).items() if name.startswith(prefixes)}


def _dimensions(config: MicroVLMConfig, part: Part) -> dict[str, int]:
    if part.role == "vision":
        vision = config.vision
        return {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "heads": vision.num_attention_heads,
            "tokens": vision.num_tokens,
        }
    text = config.text
    return {
        "vocabulary": text.vocab_size,
        "width": text.hidden_size,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_width": text.head_dim,
        "inner_width": text.intermediate_size,
        "positions": text.max_position_embeddings,
    }


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return _is_matrix(name, shape) and not name.startswith("embedding.")


def _megabytes(shapes: dict[str, tuple[int, ...]], width: float, part: Part) -> float:
    """MB of a part whose linears are exported at `width` bits; norms, biases and positions stay float32."""
    linear_bits = max(width, 8) if part.role == "vision" else width
    total = 0
    for name, shape in shapes.items():
        if _is_matrix(name, shape):
            rows, columns = shape
            total += _bytes(
                rows, columns, embedding_bits(width) if name.startswith("embedding.") else linear_bits
            )
        else:
            total += prod(shape) * _FLOAT
    return total / 1e6


def _bytes(rows: int, columns: int, bits: float) -> int:
    """Bytes of a matrix at a width of the table of operators."""
    if bits == 16:
        return rows * columns * _HALF
    op = _product(bits)
    types = op.weight_types(rows, columns, scales=1 if op.is_ternary else rows)
    return sum(prod(shape) * (_FLOAT if dtype == "float32" else 1) for shape, dtype in types.values())


def _product(bits: float) -> OpSpec:
    if bits == 1.58:
        return MATMUL_BY_PACKING[WeightFormat().packing]
    return next(op for op in MATMUL_BY_KIND.values() if op.quantize is not None and op.bits == bits)


def _stored(part: Part) -> dict[str, Any]:
    """Bytes of the files of weights, and the number of tensors of each type, as far as headers say."""
    if part.gguf is not None:
        kinds = Counter(tensor.type.name for tensor in part.gguf.tensors.values())
        return {"bytes": part.gguf.path.stat().st_size, "tensors": dict(kinds.most_common())}
    files = _weight_files(part.folder)
    kinds = Counter(
        tensor.dtype
        for path in files
        if path.suffix == ".safetensors"
        for tensor in read_header(path, "copy the checkpoint again").tensors.values()
    )
    return {"bytes": sum(path.stat().st_size for path in files), "tensors": dict(kinds.most_common())}


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights that a folder has; none where only its documents were fetched."""
    for name, index, pattern in (
        (WEIGHTS, INDEX, "*.safetensors"),
        (PICKLED, PICKLED_INDEX, "pytorch_model*.bin"),
    ):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            return sorted(folder.glob(pattern))
    return []


def refuse_loading(options: Iterable[object]) -> None:
    """Raise UserError where --backend or --target was given for a part, which no backend runs."""
    if any(option is not None for option in options):
        raise UserError(
            "--backend and --target load a whole model: leave them out, or assemble the part first."
        )
