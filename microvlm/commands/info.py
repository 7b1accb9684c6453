"""`microvlm info`: parameters, bytes and bits per weight of each part, measured from a model's files. Needs no torch.

`parameters` counts the weights that the network uses: rows times columns of packed layers. Padding, scales and
multipliers add bytes but no parameters. Values that are not measured are named `predicted_`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from microvlm.commands.options import backend_option, open_model, target_option
from microvlm.console import echo, print_json
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.formats.weight_format import PACKING_HELP
from microvlm.sizes.smaller import Smaller
from microvlm.sizes.smaller_flags import read_weight_format, smaller_options
from microvlm.sources.model_source import BUNDLED_HELP, DEFAULT_MODEL, find_model
from microvlm.terminal.suggestions import BITS, EMBEDDING_BITS, MODEL

if TYPE_CHECKING:
    from microvlm.config import MicroVLMConfig
    from microvlm.formats.lowered_layer import LoweredLayer
    from microvlm.formats.stored_tensors import StoredTensor

PARTS = {
    "vision": ("vision",),
    "adapter": ("adapter",),
    "embedding": ("embedding",),
    "decoder": ("decoder",),
    "memory": ("memory_encoder", "memory_projection", "scope", "memory_prior"),
}
_BODY = ("decoder", "memory_encoder")
_BODY_WIDTHS = {"1.6 bit": 1.6, "2 bit": 2.0}
_EMBEDDING_WIDTHS = {"fp16": 16.0, "int8 per row": 8.0, "int4, groups of 32": 4.25}


@click.command(epilog=BUNDLED_HELP)
@click.argument("model", type=MODEL, default=DEFAULT_MODEL)
@target_option
@backend_option
@click.option(
    "--bits", type=BITS, help="Predict an export at this width of linear weights: 32, 16, 8, 4 or 1.58."
)
@click.option("--packing", help=f"The same for its packing. {PACKING_HELP}")
@click.option("--embedding-bits", type=EMBEDDING_BITS, help="The same for its token table: 16, 8 or 4.")
@smaller_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def info(
    model: str,
    backend: str | None,
    target: str | None,
    bits: str | None,
    packing: str | None,
    embedding_bits: str | None,
    smaller: Smaller,
    as_json: bool,
) -> None:
    """Parameters, bytes and bits per weight of MODEL (a checkpoint or a bundle), measured from its files.

    With --backend or --target the model is also loaded, and the machine and the code that run it are shown. Of an
    encoder or a decoder to assemble (a folder, a hub id or a GGUF file): dimensions, parameters, sizes at each width.
    With flags of an export, what microvlm-export would make of a checkpoint: predicted bytes on disk and in memory.

    \b
    Example: microvlm info photo --bits 1.58 --embedding-bits 4
    """
    from microvlm.model.pretrained.parts import part_of

    if any(flag is not None for flag in (bits, packing, embedding_bits)) or not smaller.is_nothing:
        from microvlm.commands.predicted_info import describe_prediction, format_prediction

        weights = read_weight_format(bits or "1.58", packing or "2bit", embedding_bits or "8")
        document = describe_prediction(model, weights, smaller)
        if as_json:
            print_json(document)
        else:
            echo(format_prediction(document))
        return
    part = part_of(model)
    if part is not None:
        from microvlm.commands.part_info import describe_part, format_part, refuse_loading

        refuse_loading((backend, target))
        document = describe_part(part)
        if as_json:
            print_json(document)
        else:
            echo(format_part(document))
        return
    source = find_model(model)
    description = describe_model(source.folder) | {"model": source.given}
    if backend is not None or target is not None:
        runtime, _, load_ms = open_model(source.folder, backend, None, target)
        description["loaded"] = {**describe_loaded(runtime), "load_ms": load_ms}
    if as_json:
        print_json(description)
    else:
        echo(format_description(description))


def describe_model(source: str | Path) -> dict[str, Any]:
    """The document of `microvlm info --json`. Raises UserError for a bad model."""
    from microvlm.config import MicroVLMConfig

    model = find_model(source)
    directory, is_bundle = model.folder, model.kind == "bundle"
    config = MicroVLMConfig.load(directory)
    tensors, layers = _read_tensors(directory, is_bundle, config)
    parts = {part: _measure(tensors, layers, prefixes) for part, prefixes in PARTS.items()}
    parts["total"] = _measure(tensors, layers, tuple(prefix for group in PARTS.values() for prefix in group))
    return {
        "model": str(source),
        "name": config.name,
        "kind": model.kind,
        "parts": parts,
        "ternary_linears": _ternary(tensors, layers),
        "file_bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "image_size": config.vision.image_size,
        "prefix_tokens": config.prefix_tokens,
        "vocabulary": config.text.vocab_size,
        "tokenizer": _tokenizer(directory),
        "memory": {"slots": config.memory.slots, "code_size": config.memory.code_size},
        "predicted_megabytes": _predict(tensors, layers, config),
        "backends": _backends(is_bundle),
    }


def _read_tensors(
    directory: Path, is_bundle: bool, config: MicroVLMConfig
) -> tuple[list[StoredTensor], dict[str, LoweredLayer]]:
    """The tensors of a bundle or a checkpoint and its lowered layers. Raises UserError if they are not `config`'s."""
    from microvlm.exporters.contract import require_graphs
    from microvlm.formats.bundle import open_bundle
    from microvlm.formats.stored_tensors import read_bundle, read_checkpoint

    if not is_bundle:
        tensors, layers = read_checkpoint(directory / "model.safetensors", config)
        return list(tensors.values()), layers
    manifest = open_bundle(directory)
    require_graphs(config, manifest.graphs, directory)
    return list(read_bundle(directory, manifest, config).values()), manifest.lowered


def describe_loaded(runtime: Any) -> dict[str, Any]:
    """The code and the machine that run a loaded runtime; null where the runtime does not know."""
    from microvlm.runtime import ReportsKernels, ReportsThreads, RunsElsewhere

    elsewhere = runtime if isinstance(runtime, RunsElsewhere) else None
    return {
        "kernels": runtime.kernels if isinstance(runtime, ReportsKernels) else None,
        "threads": runtime.threads if isinstance(runtime, ReportsThreads) else None,
        "target": elsewhere and elsewhere.target,
        "device": elsewhere and elsewhere.device,
    }


def format_description(description: dict[str, Any]) -> str:
    """The document of `describe_model` as a table."""
    lines = [
        f"{printable(description['name'])} ({description['kind']}), {description['file_bytes'] / 1e6:.2f} MB of files, "
        f"{description['image_size']} px images as {description['prefix_tokens']} tokens, "
        f"memory of {description['memory']['slots']} x {description['memory']['code_size']}",
        "",
        f"{'part':<12}{'parameters':>14}{'bytes':>14}{'bits/weight':>13}",
    ]
    for part, row in description["parts"].items():
        bits = f"{row['bits_per_weight']:.2f}"
        lines.append(f"{part:<12}{row['parameters']:>14,}{row['bytes']:>14,}{bits:>13}")
    ternary = description["ternary_linears"]
    if ternary["parameters"]:
        lines.append(
            f"{'of which ternary':<13}{ternary['parameters']:>13,}{ternary['bytes']:>14,}"
            f"{ternary['bits_per_weight']:>13.2f}"
        )
    lines += ["", "predicted sizes, MB (vision, adapter, W_M at 8 bits; norms and biases as stored)"]
    lines.append(f"{'embedding':<22}" + "".join(f"{'body ' + body:>14}" for body in _BODY_WIDTHS))
    for row, sizes in description["predicted_megabytes"].items():
        lines.append(f"{row:<22}" + "".join(f"{sizes[body]:>14.1f}" for body in _BODY_WIDTHS))
    if description["tokenizer"]:
        lines += ["", f"tokenizer: {description['tokenizer']}"]
    lines += ["", *(f"backend {name}: {state}" for name, state in description["backends"].items())]
    if "loaded" in description:
        lines += ["", *_format_loaded(description["loaded"])]
    return "\n".join(lines)


def _format_loaded(loaded: dict[str, Any]) -> list[str]:
    kernels = loaded["kernels"] or "the backend's own"
    lines = [
        f"loaded: quantised layers by {kernels}, threads {loaded['threads'] or 'as the backend chooses'}"
    ]
    device = loaded["device"]
    if device is None:
        return lines
    memory = f"{device['memory_bytes'] / 1e6:.0f} MB" if device["memory_bytes"] else "unknown memory"
    lines.append(
        f"{device['board'] or device['machine']}: {device['cpu']}, {device['cores']} cores, {memory}"
    )
    lines.append(
        f"{device['system']}, {device['c_library']}, Python {device['python']}, "
        f"onnxruntime {device['onnxruntime']}"
    )
    return [*lines, f"features: {' '.join(device['features'])}"]


def _measure(
    tensors: Iterable[StoredTensor], layers: dict[str, LoweredLayer], prefixes: tuple[str, ...]
) -> dict[str, Any]:
    from microvlm.formats.stored_tensors import parameters_of

    chosen = [tensor for tensor in tensors if tensor.name.partition(".")[0] in prefixes]
    return _row(sum(parameters_of(t, layers) for t in chosen), sum(t.nbytes for t in chosen))


def _row(parameters: int, nbytes: int) -> dict[str, Any]:
    return {"parameters": parameters, "bytes": nbytes, "bits_per_weight": 8 * nbytes / max(1, parameters)}


def _ternary(tensors: Iterable[StoredTensor], layers: dict[str, LoweredLayer]) -> dict[str, Any]:
    """Parameters and bytes of the ternary layers alone, with their scales."""
    from microvlm.formats.stored_tensors import parameters_of

    trits = {name for name, layer in layers.items() if layer.kind.startswith("ternary")}
    chosen = [t for t in tensors if t.name.rpartition(".")[0] in trits and not t.name.endswith(".bias")]
    return _row(sum(parameters_of(t, layers) for t in chosen), sum(t.nbytes for t in chosen))


def _predict(
    tensors: Iterable[StoredTensor], layers: dict[str, LoweredLayer], config: MicroVLMConfig
) -> dict[str, dict[str, float]]:
    """Predicted MB of the model at other widths, from its parameters."""
    from microvlm.formats.stored_tensors import parameters_of

    embedding = config.text.vocab_size * config.text.hidden_size
    body = matrices = rest = 0
    for tensor in tensors:
        part, count = tensor.name.partition(".")[0], parameters_of(tensor, layers)
        owner, _, leaf = tensor.name.rpartition(".")
        if part == "embedding" or (owner in layers and leaf in ("scale", "multiplier")):
            continue
        if leaf in ("packed", "weight") and (owner in layers or len(tensor.shape) == 2):
            body, matrices = (body + count, matrices) if part in _BODY else (body, matrices + count)
        else:
            rest += tensor.nbytes
    return {
        table: {
            name: (embedding * bits / 8 + body * width / 8 + matrices + rest) / 1e6
            for name, width in _BODY_WIDTHS.items()
        }
        for table, bits in _EMBEDDING_WIDTHS.items()
    }


def _tokenizer(directory: Path) -> str | None:
    """Name of the tokenizer's implementation, or None for a model without a tokenizer."""
    from microvlm.inputs.tokenizer import TOKENIZER, load_tokenizer

    return load_tokenizer(directory).description if (directory / TOKENIZER).is_file() else None


def _backends(is_bundle: bool) -> dict[str, str]:
    """Describes, for each registered backend, whether and how it would run this model on this machine."""
    from microvlm.backends import backend_names, get_backend, native

    native.library_path()  # a library that the user named and that cannot be loaded ends the command
    states = {}
    for name in backend_names():
        kernels = None
        try:
            backend = get_backend(name)
            reason = backend.unavailable()
            kernels = None if reason else backend.kernels()
        except UserError as error:
            reason = str(error)
        runs = "runs its graphs" if is_bundle else "runs it after an export, made on first use"
        if name == "torch":
            runs = "runs the graphs' weights eagerly" if is_bundle else "runs it eagerly"
        runs += f", quantised layers by {kernels}" if kernels else ""
        states[name] = f"cannot run here: {reason}" if reason else runs
    return states
