"""What the stages of the preset `photo` have in common: encoded pictures, a frozen encoder and named trained parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from microvlm.errors import UserError
from microvlm.model.convolution.efficientnet import EfficientNetLite
from microvlm.model.microvlm import MicroVLM
from microvlm.training.photo.batches.picture_questions import Questioner
from microvlm.training.photo.data.builder import TEXTS
from microvlm.training.photo.data.encoder import load_convolutions, read_encoder
from microvlm.training.photo.data.photo_data import PhotoData
from microvlm.training.photo.language.question_forms import KINDS, forms
from microvlm.training.stages.task import DataFolder, StageInputs, WholeModelTask

TRAINED = ("adapter", "embedding", "decoder")
"""The parts that answers about pictures train."""
TOKENIZER_PICTURES, TOKENIZER_FORMS, NAME_REPEATS = 20_000, 2000, 4
"""Pictures and wordings of a kind that the tokenizer learns from, and how often each name is repeated."""


class PhotoTask(WholeModelTask):
    """A stage over a folder of `microvlm-data photo`, whose encoder becomes the model's."""

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        if not self.config.vision.is_convolutional:
            raise UserError(
                f"stage '{self.stage.name}' needs a model with a convolutional encoder, such as preset photo."
            )
        self.data: PhotoData = inputs.data
        self.module = self.model
        load_convolutions(encoder_of(self.model), read_encoder(self.data.folder))
        self.model.requires_grad_(False)
        for part in self.trained_parts():
            part.requires_grad_(True)

    @abstractmethod
    def trained_parts(self) -> list[nn.Module]:
        """The parts that this stage trains."""

    @classmethod
    def open_data(cls, folders: Sequence[DataFolder]) -> PhotoData:
        if len(folders) != 1:
            raise UserError("a photo stage trains on one folder of microvlm-data photo.")
        return PhotoData.open(folders[0].path)

    @classmethod
    def tokenizer_texts(cls, data: PhotoData) -> Iterable[str]:
        rng = np.random.default_rng(0)
        questioner = Questioner(data.names)
        for _ in range(NAME_REPEATS):
            for name in data.names:
                yield name
                yield f" {name}"
        descriptions = data.descriptions("train")
        for row in rng.permutation(len(descriptions))[:TOKENIZER_PICTURES]:
            asked = questioner.ask(descriptions[row], rng)
            yield asked.question
            yield asked.answer
        for kind in KINDS:
            yield from (
                form.replace("{", "").replace("}", "") for form in forms(kind, "train")[:TOKENIZER_FORMS]
            )
        texts = data.folder / TEXTS
        if texts.is_file():
            yield from texts.read_text(encoding="utf-8").splitlines()

    @classmethod
    def describe_data(cls, data: PhotoData) -> list[dict[str, Any]]:
        index = data.index
        described = {"encoder": index.encoder, "seed": index.seed, "chunks": index.chunks}
        return [{"name": data.folder.name, "samples": index.chunks["train"] * index.chunk, **described}]

    def parameter_groups(self) -> list[dict]:
        parameters = [parameter for part in self.trained_parts() for parameter in part.parameters()]
        return [{"params": parameters, "lr": self.stage.learning_rate}]


def encoder_of(model: MicroVLM) -> EfficientNetLite:
    """The convolutional encoder of a model that has one."""
    return cast(EfficientNetLite, model.vision)


def prefixes_of(model: MicroVLM, features: Tensor, is_told: Tensor | None = None) -> Tensor:
    """Prefix embeddings [B, k, H] of feature maps uint8 [B, F, S, S]; gradients reach the adapter.

    is_told : bool [B], pictures whose first token has class probabilities alone.
    """
    encoder, device = encoder_of(model), model.memory_prior.device
    tokens = encoder.tokens(features.to(device)).detach()
    if is_told is not None:
        first = hide_features(tokens[:, :1], is_told.to(device), encoder.config.features_of_token)
        tokens = torch.cat([first, tokens[:, 1:]], 1)
    prefixes: Tensor = model.adapter(tokens)
    return prefixes


def hide_features(tokens: Tensor, is_told: Tensor, features: int) -> Tensor:
    """Tokens [B, n, features + classes] with zeros for the features of the pictures `is_told`, bool [B]."""
    seen = torch.where(is_told[:, None, None], torch.zeros(()).to(tokens), tokens[..., :features])
    return torch.cat([seen, tokens[..., features:]], -1)
