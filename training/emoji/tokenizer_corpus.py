"""The texts that the tokenizer of `nano` is trained on."""

from __future__ import annotations

from microvlm.memory.ordinal_questions import ORDINALS, ordinal_question
from microvlm.training.batches.sample_texts import CAPTION_PROMPTS
from microvlm.training.emoji.data.emoji import EmojiData
from microvlm.training.emoji.data.scenes import GROUNDS, NUMBERS, read_scene_objects


def tokenizer_corpus(emoji: EmojiData) -> list[str]:
    """The texts that the tokenizer is trained on: all captions (a name is not a label), prompts and questions."""
    lines = [*emoji.captions, *(" " + caption for caption in emoji.captions), *CAPTION_PROMPTS]
    lines += [ordinal_question(step) for step in range(len(ORDINALS))]
    lines += [
        "how many objects are there?",
        "which colour is the ground?",
        *NUMBERS,
        *(name for name, _ in GROUNDS),
    ]
    lines += ["what is on the left?", "what is on the right?", "what is above?", "what is below?"]
    lines += ["left", "right", "above", "below"] * 50
    for _, caption in read_scene_objects():
        lines += [f"where is the {caption}?"]
        lines += [f"what is {side} the {caption}?" for side in ("left of", "right of", "above", "below")]
    return lines
