"""`microvlm`: caption pictures, chat with a memory, look into a model. Imports backends only when a command runs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from microvlm import __version__
from microvlm.commands.memory_command import memory
from microvlm.commands.model_options import (
    backend_option,
    check_sampling,
    generation_options,
    model_options,
    open_model,
    sampling_options,
    target_option,
)
from microvlm.console import print_json, run_click
from microvlm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from microvlm.backends import LoadedRuntime
    from microvlm.generation import GenerationOptions
    from microvlm.inputs.processor import Processor
    from microvlm.runtime import Memories


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """A tiny vision-language model with an episodic memory and 1.58-bit weights."""


@cli.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--prompt", help="What to ask; the model's captioning prompt when left out.")
@click.option(
    "--memory", "memory_file", help="A memory file to read from, as chat writes it; it is not changed."
)
@click.option(
    "--attention", metavar="FILE.png", help="Draw where each word looked (one image, backend torch)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@sampling_options
@model_options
def caption(
    images: tuple[str, ...],
    prompt: str | None,
    memory_file: str | None,
    attention: str | None,
    as_json: bool,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    model: str,
    backend: str | None,
    threads: int | None,
    target: str | None,
) -> None:
    """Describe each IMAGE, or answer a question about it."""
    from microvlm.inputs.images import check_file

    check_sampling(max_new_tokens, temperature, top_p, seed)
    for image in images:
        check_file(image)
    if attention is not None:
        backend = _check_attention(attention, images, backend)
    runtime, processor, load_ms = open_model(model, backend, threads, target)
    options = generation_options(processor, max_new_tokens, temperature, top_p, seed)
    memory = read_memory(memory_file, runtime)
    results = []
    for image in images:
        result = caption_one(runtime, processor, image, prompt, options, memory, attention)
        result["timings_ms"] = {"load": load_ms, **result["timings_ms"]}
        results.append({"image": image, **result})
        if not as_json:
            click.echo(result["caption"] if len(images) == 1 else f"{image}: {result['caption']}")
    if as_json:
        single = {key: results[0][key] for key in ("caption", "tokens", "timings_ms")}
        print_json(single if len(images) == 1 else {"results": results})


@cli.command()
@click.option("--memory", "memory_file", help="Carry the memory on in this file; made when it is not there.")
@sampling_options
@model_options
def chat(
    memory_file: str | None,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    model: str,
    backend: str | None,
    threads: int | None,
    target: str | None,
) -> int:
    """Talk about pictures. What was seen is remembered; /help lists the commands.

    Lines may come from a pipe. Status 2 then says that one of them was refused; the others were answered.
    """
    from microvlm.commands.chat_loop import ChatLoop
    from microvlm.memory.conversation import Chat

    check_sampling(max_new_tokens, temperature, top_p, seed)
    runtime, processor, _ = open_model(model, backend, threads, target)
    options = generation_options(processor, max_new_tokens, temperature, top_p, seed)
    return ChatLoop(Chat(runtime, processor, options), memory_file).run()


@cli.command()
@click.argument("model", default="nano")
@target_option
@backend_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def info(model: str, backend: str | None, target: str | None, as_json: bool) -> None:
    """Parameters, bytes and bits per weight of MODEL (a checkpoint or a bundle), measured from its files.

    With --backend or --target, also the machine and the code that would run it: it is loaded there.
    """
    from microvlm.commands.info import describe_loaded, describe_model, format_description

    description = describe_model(model)
    if backend is not None or target is not None:
        runtime, _, load_ms = open_model(model, backend, None, target)
        description["loaded"] = {**describe_loaded(runtime), "load_ms": load_ms}
    if as_json:
        print_json(description)
    else:
        click.echo(format_description(description))


cli.add_command(memory)


def read_memory(path: str | None, runtime: LoadedRuntime) -> Memories | None:
    """The states of a memory file that must exist, or None without one. Raises UserError."""
    from microvlm.memory.memory_file import load_memory

    return None if path is None else load_memory(path, runtime.fingerprint).states


def caption_one(
    runtime: LoadedRuntime,
    processor: Processor,
    image: str,
    prompt: str | None,
    options: GenerationOptions,
    memory: Memories | None,
    attention: str | None,
) -> dict[str, Any]:
    """`caption`, `tokens` (ids) and `timings_ms` of one image; draws its heatmap to the file `attention`."""
    from microvlm.generation import Timings, embed_prompt, generate

    start, timings = time.perf_counter(), Timings()
    question = processor.config.prompt.caption_prompt if prompt is None else prompt
    with timings.phase("preprocess"):
        inputs = processor([question], [[image]])
    ready = embed_prompt(runtime, *inputs, processor.image_id, timings)
    made = generate(runtime, ready, options, memory, timings=timings)
    timings.milliseconds["total"] = (time.perf_counter() - start) * 1e3
    text = processor.decode(made.tokens[0]).strip()
    if attention is not None:
        from microvlm.commands.heatmap import draw, word_maps
        from microvlm.model.torch_runtime import TorchRuntime

        if not isinstance(runtime, TorchRuntime):
            raise UserError("--attention needs --backend torch: the other graphs give no attention weights.")
        maps = word_maps(runtime, processor, inputs, ready, made.tokens[0], memory)
        _save_png(draw(image, maps, text), Path(attention))
    return {"caption": text, "tokens": made.tokens[0], "timings_ms": timings.milliseconds}


def _check_attention(attention: str, images: Sequence[str], backend: str | None) -> str:
    path = Path(attention)
    if path.suffix.lower() != ".png":
        raise UserError(f"--attention {attention} is no .png; give a file name that ends in .png.")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(
            f"--attention {attention} cannot be written: its folder must exist and it must be a file."
        )
    if len(images) != 1:
        raise UserError(f"--attention draws one image and {len(images)} were given; caption them one by one.")
    if backend not in (None, "torch"):
        raise UserError(
            f"--attention needs --backend torch: graphs on '{backend}' give no attention weights."
        )
    return "torch"


def _save_png(picture: Image, path: Path) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        picture.save(aside, format="PNG")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def main() -> None:
    """Entry point of the console script."""
    run_click(cli)
