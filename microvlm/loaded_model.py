"""The Python API around one model: `load`, `export` and `LoadedModel`, one type for every backend. Needs no torch."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast, overload, runtime_checkable

from microvlm.answers.answering import Answer, answer_prompt
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, embed_prompt
from microvlm.inputs.batch import Images, Prompts, build_batch
from microvlm.inputs.images import ImageSource
from microvlm.inputs.processor import Processor
from microvlm.runtime import Memories, MemoryArrays
from microvlm.sources.model_source import DEFAULT_MODEL, find_model

if TYPE_CHECKING:
    from microvlm.backends.base import LoadedRuntime
    from microvlm.backends.threads import Threads
    from microvlm.config import MicroVLMConfig
    from microvlm.memory.episodic import EpisodicMemory

    MemorySource: TypeAlias = Memories | EpisodicMemory | "HasMemory" | str | os.PathLike[str]
    """The memories that `generate` can read: a FactMemory, a Chat, a memory file, or their states."""
    ModelSource: TypeAlias = "LoadedModel | ConvertsToLoadedModel | LoadedRuntime"
    """The models that `Chat` and `FactMemory` take: a result of `load`, a MicroVLM, or a runtime."""


class HasMemory(Protocol):
    """A FactMemory or a Chat: a memory of one model."""

    runtime: LoadedRuntime
    memory: EpisodicMemory


@runtime_checkable
class ConvertsToLoadedModel(Protocol):
    """A MicroVLM, which this module does not import because it needs torch."""

    def to_loaded_model(self, processor: Processor | None = None) -> LoadedModel:
        """The same model on the backend `torch`."""
        ...


class LoadedModel:
    """A model on one backend, with its processor. Built by `load`."""

    def __init__(self, runtime: LoadedRuntime, processor: Processor):
        self.runtime, self.processor = runtime, processor

    @property
    def config(self) -> MicroVLMConfig:
        """The model's sizes and prompts."""
        return self.runtime.config

    def __repr__(self) -> str:
        return f"LoadedModel({self.config.name!r}, {type(self.runtime).__name__}, '{self.runtime.directory}')"

    @overload
    def generate(
        self,
        images: ImageSource | None = None,
        prompts: str | None = None,
        options: GenerationOptions | None = None,
        *,
        memory: MemorySource | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> str: ...

    @overload
    def generate(
        self,
        images: list[Any] | tuple[Any, ...],
        prompts: Prompts | None = None,
        options: GenerationOptions | None = None,
        *,
        memory: MemorySource | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        images: Images | None = None,
        *,
        prompts: list[str] | tuple[str, ...],
        options: GenerationOptions | None = None,
        memory: MemorySource | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[str]: ...

    def generate(
        self,
        images: Images | None = None,
        prompts: Prompts | None = None,
        options: GenerationOptions | None = None,
        *,
        memory: MemorySource | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> str | list[str]:
        """Answer prompts about images; without prompts, caption the images.

        `images` is one image (see `ImageSource`) or a list; an entry of the list may be a list of several images for
        one prompt. `prompts` is one text or a list. A single image goes with every prompt and a single prompt with
        every image. Returns a string when neither is a list, else a list of strings. The keywords replace values of
        `options`, whose defaults are the model's. Prompts read `memory` where it is in scope; it is not changed.
        A declined answer (`answer` tells) is the model's declining text. Raises UserError for anything else.
        """
        changes = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        answers = self._answer(images, prompts, complete_options(self.processor, options, **changes), memory)
        return answers.text if isinstance(answers, Answer) else [answer.text for answer in answers]

    def answer(
        self,
        images: Images | None = None,
        prompts: Prompts | None = None,
        options: GenerationOptions | None = None,
        *,
        memory: MemorySource | None = None,
        guesses: int = 0,
        min_confidence: float | None = None,
    ) -> Answer | list[Answer]:
        """Answer as `generate` does -> an `Answer` with its confidence, or a list of them.

        `guesses`: how many of the likeliest answers to find for each prompt, which takes several times as long.
        `min_confidence`: the threshold in place of the model's own; 0 declines only what the model's own words decline.
        Raises UserError, also for a threshold where the model's answers were never calibrated.
        """
        return self._answer(
            images, prompts, complete_options(self.processor, options), memory, guesses, min_confidence
        )

    def _answer(
        self,
        images: Images | None,
        prompts: Prompts | None,
        options: GenerationOptions,
        memory: MemorySource | None,
        guesses: int = 0,
        min_confidence: float | None = None,
    ) -> Answer | list[Answer]:
        default_prompt = self.config.prompt.caption_prompt
        batch = build_batch(images, prompts, default_prompt, self.config.vision)
        states = _states(memory, self.runtime)
        inputs = self.processor(batch.prompts, batch.images)
        prompt = embed_prompt(self.runtime, *inputs, self.processor.image_id)
        answers = answer_prompt(
            self.runtime, self.processor, prompt, options, states, guesses, min_confidence
        )
        return answers[0] if batch.is_single else answers


def load(
    source: str | os.PathLike[str] = DEFAULT_MODEL,
    backend: str | None = None,
    threads: Threads = None,
    target: str | None = None,
) -> LoadedModel:
    """Load a checkpoint or a bundle: a folder, a hub id (owner/name) or a bundled name; a Path is always a folder.

    `backend`: torch, ort, ort-arm64 or another installed one; None takes `default_backend`. `threads`: of one operator;
    None leaves the number to the backend, "auto" measures once which one answers fastest. `target`: the device of
    ort-arm64 (local, ssh:USER@HOST[:PORT] or emulated[:CPU]); it implies that backend. Raises UserError for a bad model
    and for a backend that cannot run here.
    """
    from microvlm.backends import load as load_runtime

    folder = find_model(source).folder
    name = backend or ("ort-arm64" if target is not None else default_backend(folder))
    runtime = load_runtime(name, folder, threads, **({} if target is None else {"target": target}))
    return LoadedModel(runtime, load_processor(runtime))


def default_backend(source: str | os.PathLike[str]) -> str:
    """`ort` for a bundle; `torch` for a checkpoint, because it needs no export, unless torch is not installed."""
    from microvlm.backends import get_backend

    is_checkpoint = find_model(source).kind == "checkpoint"
    return "torch" if is_checkpoint and get_backend("torch").unavailable() is None else "ort"


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    bits: float = 1.58,
    packing: str = "2bit",
    embedding_bits: int = 8,
    vocabulary: int | None = None,
    force: bool = False,
    genai: bool = False,
    layers: int | None = None,
    slots: int | None = None,
    lowering: str = "custom",
) -> Path:
    """Export a checkpoint to the folder `output`, checked against PyTorch -> the path of the bundle.

    `bits` and `embedding_bits` are those of a weight, `packing` is 2bit or base3, `vocabulary` the most tokens,
    `layers` the decoder layers and `slots` the memory slots to keep, and `force` replaces a bundle that exists. With
    `genai` the bundle also has a decoder for other programs; `lowering` names the operators of products (custom,
    matmulnbits or qdq). Needs the packages of microvlm[export]. Raises UserError
    for bad input, for missing packages and for a graph whose outputs are not the model's.
    """
    from microvlm.formats.weight_format import WeightFormat
    from microvlm.sizes.smaller import Smaller

    if not isinstance(output, str | os.PathLike):
        raise UserError(f"output= is {output!r}; give a folder, as text or as a path.")
    weights = WeightFormat(bits, packing, embedding_bits, lowering)
    try:
        from microvlm.exporters.bundle_writer import CheckFailed
        from microvlm.exporters.bundle_writer import export as write_bundle
    except ModuleNotFoundError as error:
        raise UserError(f"export needs the package '{error.name}': pip install 'microvlm[export]'.") from None
    try:
        smaller = Smaller(layers=layers, slots=slots, vocabulary=vocabulary)
        write_bundle(source, Path(output), weights, smaller=smaller, force=force, genai=genai)
    except CheckFailed as failure:
        raise UserError(f"{source} cannot be exported here ({failure}); try microvlm-export.") from None
    return Path(output)


def complete_options(
    processor: Processor, options: GenerationOptions | None = None, **changes: Any
) -> GenerationOptions:
    """`options` with those `changes` that are not None; length and stop tokens default to the processor's.

    Stop tokens of None are the processor's; an empty tuple stays empty. Raises UserError for another type.
    """
    if options is None:
        options = GenerationOptions(max_new_tokens=processor.max_new_tokens)
    elif not isinstance(options, GenerationOptions):
        raise UserError(f"options= takes a GenerationOptions, not {type(options).__name__}.")
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.stop_tokens is None:
        changes.setdefault("stop_tokens", processor.stop_tokens)
    return dataclasses.replace(options, **changes)


def runtime_and_processor(
    model: ModelSource, processor: Processor | None = None
) -> tuple[LoadedRuntime, Processor]:
    """The parts of a loaded model, of a `MicroVLM`, or of a runtime with its processor. Raises UserError."""
    if isinstance(model, LoadedModel):
        return model.runtime, processor or model.processor
    if isinstance(model, ConvertsToLoadedModel):
        return runtime_and_processor(model.to_loaded_model(processor))
    if not hasattr(model, "memory_encode"):
        raise UserError(
            f"give a model, as microvlm.load or MicroVLM.from_pretrained returns it, not {type(model).__name__}."
        )
    runtime = cast("LoadedRuntime", model)
    return runtime, processor or load_processor(runtime)


def load_processor(runtime: LoadedRuntime) -> Processor:
    """The processor of a runtime's model. Raises UserError where a bundle's files are not those that were checked."""
    from microvlm.formats.bundle import FILES_READ_BY_NAME, BundleFiles

    processor = Processor.from_pretrained(runtime.directory)
    files = getattr(runtime, "files", None)
    if isinstance(files, BundleFiles):
        files.require_unchanged(FILES_READ_BY_NAME)
    return processor


def _states(memory: Any, runtime: LoadedRuntime) -> Memories | None:
    """The states of whatever `generate` takes as memory. Raises UserError, also for another model's memory."""
    from microvlm.memory.episodic import EpisodicMemory
    from microvlm.memory.memory_file import open_memory

    if memory is None or isinstance(memory, MemoryArrays):
        return memory
    if isinstance(memory, list) and memory and all(isinstance(state, MemoryArrays) for state in memory):
        return memory
    if isinstance(memory, EpisodicMemory):
        memory.write_pending(runtime)
        return memory.states
    if isinstance(memory, str | os.PathLike):
        return open_memory(Path(memory), runtime).states
    if isinstance(getattr(memory, "memory", None), EpisodicMemory):
        if memory.runtime.fingerprint != runtime.fingerprint:
            raise UserError("memory= belongs to another model; give a memory of this one.")
        return memory.memory.states
    raise UserError(
        "memory= takes a FactMemory, a Chat, a memory file's path or memory states, "
        f"not {type(memory).__name__}."
    )
