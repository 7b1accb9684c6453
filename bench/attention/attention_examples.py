"""Answers to a few pictures of the package's own sets, with a map for each word of where it looked.

Reads one model on the backend `torch`; the maps are those of `microvlm caption --attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from microvlm.answers.answering import answer_prompt
from microvlm.bench.equivalence.samples import Sample
from microvlm.commands.attention_reading import read_attention
from microvlm.commands.heatmap import plain_map
from microvlm.generation import embed_prompt
from microvlm.inputs.processor import Processor
from microvlm.loaded_model import complete_options

if TYPE_CHECKING:
    from microvlm.backends.base import LoadedRuntime
    from microvlm.model.torch_runtime import TorchRuntime


def read_examples(
    runtime: LoadedRuntime, processor: Processor, samples: Sequence[Sample], prompt: str
) -> list[dict[str, Any]]:
    """`picture`, `right`, `answer` and `maps` of each sample's first picture, asked `prompt`.

    Raises UserError for a picture that cannot be read.
    """
    model_runtime, options, examples = cast("TorchRuntime", runtime), complete_options(processor), []
    for sample in samples:
        inputs = processor([prompt], [[sample.images[0]]])
        embedded = embed_prompt(runtime, *inputs, processor.image_id)
        (answer,) = answer_prompt(runtime, processor, embedded, options)
        reading = read_attention(model_runtime, processor, inputs, embedded, answer.tokens)
        examples.append(
            {
                "picture": sample.name,
                "right": sample.answer,
                "answer": answer.own_text,
                "maps": [plain_map(word) for word in reading.maps],
            }
        )
    return examples
