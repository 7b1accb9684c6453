"""`microvlm assemble`: a pretrained encoder and a pretrained decoder become a checkpoint to train, export and run."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from microvlm.commands.info import PARTS
from microvlm.commands.options import WholeNumber
from microvlm.config import CONFIG
from microvlm.console import after_saving, echo, print_json
from microvlm.errors import UserError
from microvlm.escaping import printable
from microvlm.terminal.step_progress import counted
from microvlm.terminal.suggestions import FILE, FOLDER

if TYPE_CHECKING:
    from microvlm.config import MicroVLMConfig
    from microvlm.model.pretrained.assembly import AssembledWeights
    from microvlm.model.pretrained.parts import Part

_MOST_SLOTS = 512


@click.command()
@click.option("--vision", type=FOLDER, required=True, help="A ViT or DeiT encoder: its folder or hub id.")
@click.option(
    "--decoder",
    type=FILE,
    required=True,
    help="A Qwen2, Llama or BitNet decoder: its folder, hub id or GGUF file.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the checkpoint."
)
@click.option(
    "--memory-slots",
    type=WholeNumber(1, 262_144),
    help="Rows of the memory, fewer than the decoder's width; 512 by default, half the width if that is less.",
)
@click.option(
    "--prefix-tokens",
    type=WholeNumber(1, 16_384),
    help="Embeddings of an image; by default an eighth of its patches, from 8 to 64. Not for a convolutional encoder.",
)
@click.option(
    "--prompt-template",
    metavar="TEXT",
    help="In place of the decoder's chat template: a text with {prompt}, and <image> where the image goes.",
)
@click.option(
    "--seed", type=WholeNumber(0, 2**63 - 1), default=0, show_default=True, help="Draws the new parts."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def assemble(
    vision: str,
    decoder: str,
    output: Path,
    memory_slots: int | None,
    prefix_tokens: int | None,
    prompt_template: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Put a pretrained encoder and decoder together, with a new adapter and memory, as a checkpoint to train.

    Weights keep their precision, and the decoder its tokenizer and chat template.

    \b
    Example: microvlm assemble --vision parts/deit-tiny --decoder parts/qwen2.5-0.5b -o start
    """
    from microvlm.model.pretrained.parts import find_part
    from microvlm.model.pretrained.prompts import check_template

    if prompt_template is not None:
        prompt_template = prompt_template.replace("\\n", "\n")
        check_template(prompt_template)
    _require_own_folder(output)
    encoder, text = find_part(vision, "vision"), find_part(decoder, "decoder")
    base = base_config(encoder, text, memory_slots, prefix_tokens)
    from microvlm.model.pretrained.assembly import assemble_checkpoint

    weights = assemble_checkpoint(
        encoder, text, base, output, template=prompt_template, seed=seed, written=_count_tensors()
    )
    with after_saving():
        document = describe(encoder, text, weights, output)
        if as_json:
            print_json(document)
        else:
            echo(format_document(document))


def base_config(
    encoder: Part, decoder: Part, memory_slots: int | None = None, prefix_tokens: int | None = None
) -> MicroVLMConfig:
    """The configuration of what no part defines, for two parts. Raises UserError."""
    from microvlm.config import MemoryConfig, MicroVLMConfig

    text = decoder.text_config()
    width = text.hidden_size
    vision = encoder.vision_config()
    if prefix_tokens and vision.is_convolutional:
        raise UserError(
            "--prefix-tokens is for encoders of patches; a convolutional one gives as many as it has windows: leave it "
            "out."
        )
    slots = memory_slots or (_MOST_SLOTS if width > _MOST_SLOTS else max(1, width // 2))
    return MicroVLMConfig(
        name=decoder.name,
        vision=vision,
        text=text,
        memory=MemoryConfig(slots=slots, code_size=width),
        prefix_tokens=prefix_tokens or 0,
    )


def describe(encoder: Part, decoder: Part, weights: AssembledWeights, output: Path) -> dict[str, Any]:
    """The document of `microvlm assemble --json`."""
    from microvlm.formats.stored_tensors import StoredTensor, parameters_of

    rows: dict[str, dict[str, Any]] = {part: {"parameters": 0, "bytes": 0} for part in [*PARTS, "total"]}
    for name, tensor in weights.tensors.items():
        nbytes = prod(tensor.shape) * tensor.dtype.itemsize
        count = parameters_of(StoredTensor(name, tensor.shape, "", nbytes), weights.layers)
        part = next(part for part, prefixes in PARTS.items() if name.partition(".")[0] in prefixes)
        for row in (rows[part], rows["total"]):
            row["parameters"] += count
            row["bytes"] += nbytes
    config = weights.config
    return {
        "report": "assemble",
        "checkpoint": str(output),
        "vision": {"given": encoder.given, "family": encoder.family},
        "decoder": {"given": decoder.given, "family": decoder.family},
        "parts": rows,
        "image_size": config.vision.image_size,
        "prefix_tokens": config.prefix_tokens,
        "vocabulary": config.text.vocab_size,
        "memory": {"slots": config.memory.slots, "code_size": config.memory.code_size},
        "ternary": config.quantization.is_ternary,
        "prompt": {
            "template": config.prompt.template,
            "image_token": config.prompt.image_token,
            "eos_token": config.prompt.eos_token,
        },
        "next": f"microvlm-train stage1 --start {output} --data DATA -o RUN",
    }


def format_document(document: dict[str, Any]) -> str:
    """The document of `describe` for people."""
    vision, decoder, memory = document["vision"], document["decoder"], document["memory"]
    lines = [
        f"{document['checkpoint']}: {vision['given']} ({vision['family']}) and {decoder['given']} "
        f"({decoder['family']}{', ternary' if document['ternary'] else ''})",
        f"{document['image_size']} px images as {document['prefix_tokens']} tokens, {document['vocabulary']:,} tokens, "
        f"memory of {memory['slots']} x {memory['code_size']}",
        "",
        f"{'part':<12}{'parameters':>14}{'MB':>10}",
    ]
    for part, row in document["parts"].items():
        new = "  new" if part in ("adapter", "memory") else ""
        lines.append(f"{part:<12}{row['parameters']:>14,}{row['bytes'] / 1e6:>10.1f}{new}")
    template = document["prompt"]["template"].replace("\n", "\\n")
    lines += ["", f"prompt: {printable(template)}", f"next: {document['next']}"]
    return "\n".join(lines)


def _count_tensors() -> Callable[[str, int], None]:
    """Called with the name of each tensor that was written and the number of all."""
    done, show = 0, counted("tensors written")

    def written(_: str, count: int) -> None:
        nonlocal done
        done += 1
        show(done, count)

    return written


def _require_own_folder(output: Path) -> None:
    """Raises UserError for a folder with files that is no checkpoint, such as a data folder."""
    if output.is_dir() and any(output.iterdir()) and not (output / CONFIG).exists():
        raise UserError(f"{output} holds other files: give --output a new folder, or one with a checkpoint.")
