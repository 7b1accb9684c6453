"""What the worker does with a loaded model and a memory: ask, tell, forget, and show what an answer rests on.

A task takes (loaded model, memory, job, emit), changes the memory and returns what the client gets. Raises UserError.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from microvlm.backends.base import LoadedRuntime
from microvlm.errors import UserError
from microvlm.inputs.images import TooLargePicture, load_square, size_of
from microvlm.inputs.processor import Processor
from microvlm.memory.conversation import Chat
from microvlm.memory.episodic import EpisodicMemory
from microvlm.memory.facts import FactMemory
from microvlm.memory.ordinal_questions import check_place, is_ordinal_question
from microvlm.sampling import GenerationOptions
from microvlm.serve.messages import Event, Job, ModelSpec

if TYPE_CHECKING:
    from microvlm.loaded_model import LoadedModel

Emit = Callable[[Event], None]
THE_PICTURE = "the picture"


def describe(loaded: LoadedModel, spec: ModelSpec) -> dict[str, Any]:
    """What a client may know of a model."""
    config = loaded.config
    return {
        "slots": int(loaded.runtime.memory_prior().mean.shape[1]),
        "caption_prompt": config.prompt.caption_prompt,
        "stretch": config.vision.resize == "stretch",
        "calibrated": config.answers is not None and config.answers.is_calibrated,
        "attention": spec.backend == "torch",
    }


def ask(loaded: LoadedModel, memory: EpisodicMemory, job: Job, emit: Emit) -> dict[str, Any]:
    """Answer as `Chat.ask` does, and write the turn into the memory. A question for a picture by its place, such as
    "what was in the first image?", is the memory's, as in `microvlm chat`."""
    processor = loaded.processor
    question = job.question or processor.config.prompt.caption_prompt
    if is_ordinal_question(question):
        check_place(question, memory.image_count)
        picture = None
    else:
        picture = _picture(processor, job)
    options = _options(processor, job)
    chat = Chat(loaded.runtime, processor, options, memory)
    turn = chat.ask(question, picture, on_text=lambda text: emit(Event("text", text)), label=job.label)
    is_own = not turn.from_memory and picture is not None and not turn.declined
    return {
        "answer": turn.answer,
        "source": "memory" if turn.from_memory else "picture" if picture is not None else "nothing",
        "declined": turn.declined,
        "confidence": turn.confidence if turn.from_memory else turn.answer_confidence,
        "entry": turn.entry,
        "stored": turn.stored,
        "finish": "length" if is_own and len(turn.tokens) >= options.max_new_tokens else "stop",
        "prompt_tokens": len(processor.prompt_ids(question, 0 if picture is None else 1)),
        "completion_tokens": len(turn.tokens),
        "timings_ms": {name: round(value, 2) for name, value in turn.timings_ms.items()},
    }


def tell(loaded: LoadedModel, memory: EpisodicMemory, job: Job, emit: Emit) -> dict[str, Any]:
    """Write a fact under its question and picture, as `/tell` in a chat does."""
    facts = FactMemory(loaded.runtime, loaded.processor, memory)
    facts.write(job.text, job.question, _picture(loaded.processor, job), job.label)
    return {}


def forget(loaded: LoadedModel, memory: EpisodicMemory, job: Job, emit: Emit) -> dict[str, Any]:
    """Forget row `job.entry`, as if it had never been written."""
    FactMemory(loaded.runtime, loaded.processor, memory).forget(job.entry)
    return {}


def look(loaded: LoadedModel, memory: EpisodicMemory, job: Job, emit: Emit) -> dict[str, Any]:
    """Answer once more without the memory, and map each word: the evidence for it, or the decoder's attention."""
    from microvlm.answers.answering import answer_prompt
    from microvlm.commands import attention_reading, evidence
    from microvlm.commands.heatmap import plain_map
    from microvlm.generation import embed_prompt
    from microvlm.memory.query import Query

    runtime, processor = loaded.runtime, loaded.processor
    picture = _picture(processor, job)
    if picture is None:
        raise UserError("give the picture whose parts are to be shown.")
    question = job.question or processor.config.prompt.caption_prompt
    inputs = Query.build(processor, question, picture).inputs(processor)
    prompt = embed_prompt(runtime, *inputs, processor.image_id)
    (answer,) = answer_prompt(runtime, processor, prompt, _options(processor, job))
    if job.kind == "evidence":

        def show(done: int, total: int) -> None:
            emit(Event("progress", value={"done": done, "total": total}))

        maps = evidence.read_evidence(runtime, processor, inputs, answer.tokens, None, show)
        floor, legend = evidence.FLOOR, evidence.LEGEND
    else:
        _require_attention(runtime, job)
        reading = attention_reading.read_attention(runtime, processor, inputs, prompt, answer.tokens)  # type: ignore[arg-type]
        side = runtime.config.vision.image_size // runtime.config.vision.patch_size
        maps, floor, legend = reading.maps, 1 / side**2, attention_reading.LEGEND
    return {
        "answer": answer.own_text,
        "declined": answer.declined,
        "legend": legend,
        "scale": max([floor, *(float(word.weights.max()) for word in maps)]),
        "maps": [plain_map(word) for word in maps],
    }


def forget_oldest_turns(loaded: LoadedModel, memory: EpisodicMemory, most: int) -> None:
    """Forget the oldest of the rows that nobody told until there are at most `most`; images last, which are counted."""
    turns = [index for index, entry in enumerate(memory.entries) if not entry.told]
    for _ in range(len(turns) - most):
        entries = [(entry.image, index) for index, entry in enumerate(memory.entries) if not entry.told]
        memory.forget(loaded.runtime, min(entries)[1])


TASKS = {"ask": ask, "tell": tell, "forget": forget, "evidence": look, "attention": look}
"""Kind of a job -> what does it."""


def _picture(processor: Processor, job: Job) -> np.ndarray | None:
    """The picture of a job at the size that the model sees, uint8 [side, side, 3]; it is decoded once."""
    if job.picture is None:
        return None
    width, height = size_of(job.picture, THE_PICTURE)
    if width * height > job.pixels:
        raise TooLargePicture(
            f"{THE_PICTURE} is {width} x {height} pixels, more than the {job.pixels / 1e6:g} million taken here; "
            "scale it down first."
        )
    vision = processor.config.vision
    return np.asarray(load_square(io.BytesIO(job.picture), vision.image_size, vision.resize == "stretch"))


def _options(processor: Processor, job: Job) -> GenerationOptions:
    from microvlm.loaded_model import complete_options

    sampling = {name: getattr(job.sampling, name) for name in job.sampling.__struct_fields__}
    return complete_options(processor, None, **sampling)


def _require_attention(runtime: LoadedRuntime, job: Job) -> None:
    if job.model.backend != "torch":
        raise UserError(
            f"the backend '{job.model.backend}' gives no attention weights: ask for the evidence, or choose torch."
        )
