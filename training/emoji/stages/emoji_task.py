"""What all stages on emoji share: how their data folder is opened, and the texts of their tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from microvlm.errors import UserError
from microvlm.training.emoji.data.emoji import EmojiData, load_emoji
from microvlm.training.emoji.tokenizer_corpus import tokenizer_corpus
from microvlm.training.stages.task import DataFolder, StageInputs, Task


class EmojiTask(Task):
    """A task on the emoji that `microvlm-data emoji` renders."""

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self.emoji: EmojiData = inputs.data

    @classmethod
    def open_data(cls, folders: Sequence[DataFolder]) -> EmojiData:
        if len(folders) != 1:
            raise UserError("this recipe trains on one folder of emoji: give one --data.")
        return load_emoji(folders[0].path)

    @classmethod
    def tokenizer_texts(cls, data: EmojiData) -> Iterable[str]:
        return tokenizer_corpus(data)
