"""What the stages of the preset `photo` have in common: encoded pictures, a frozen encoder and named trained parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.errors import UserError
from microvlm.model.convolution.efficientnet import EfficientNetLite
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.photo.batches.picture_questions import Questioner
from microvlm.training.photo.batches.virtual_pictures import VirtualPictures
from microvlm.training.photo.data.builder import TEXTS
from microvlm.training.photo.data.encoder import load_convolutions, read_encoder
from microvlm.training.photo.data.photo_data import PhotoData
from microvlm.training.photo.language import answers
from microvlm.training.photo.language.question_forms import KINDS, forms
from microvlm.training.stages.task import DataFolder, StageInputs, WholeModelTask

TRAINED = ("adapter", "embedding", "decoder")
"""The parts that answers about pictures train."""
STATISTICS = 3000
"""Photographs whose features give the metric of virtual pictures."""
SAME_NAME = 0.9
"""Least cosine of the embeddings that spell a name in a model with those of its tokens."""
TOKENIZER_PICTURES, TOKENIZER_FORMS, NAME_REPEATS = 20_000, 2000, 4
"""Pictures and wordings of a kind that the tokenizer learns from, and how often each name is repeated."""


class PhotoTask(WholeModelTask):
    """A stage over a folder of `microvlm-data photo`, whose encoder becomes the model's."""

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self.start = inputs.start
        if not self.config.vision.is_convolutional:
            raise UserError(
                f"stage '{self.stage.name}' needs a model with a convolutional encoder, such as preset photo."
            )
        self.data: PhotoData = inputs.data
        self._check_colours()
        self.module = self.model
        load_convolutions(encoder_of(self.model), read_encoder(self.data.folder))
        self.model.requires_grad_(False)
        for part in self.trained_parts():
            part.requires_grad_(True)
        if self.config.vision.name_pieces:
            # They follow the embedding.
            cast(nn.Module, self.model.adapter.names).requires_grad_(False)
        self.spelling = self._spell()

    def _check_colours(self) -> None:
        """Raises UserError where either the folder or the model has colours."""
        if self.data.index.colours and not self.config.vision.colours:
            raise UserError(
                f"{self.data.folder} has colours, which this model does not read: set 'colours' in the recipe to true, "
                "or build a folder without --colours."
            )
        if self.config.vision.colours and not self.data.index.colours:
            raise UserError(
                f"{self.data.folder} lacks the colours that this model reads: build another folder with "
                "microvlm-data photo --colours."
            )

    def prepare(self) -> None:
        """Raises UserError where the run starts from a model whose classes have other names."""
        table = self.name_table()
        if self.start is None or table is None:
            return
        stored = cast(nn.Linear, self.model.adapter.names).weight.detach().T
        spelled = table.detach().flatten(1)
        named = spelled.abs().amax(1) > 0
        alike = F.cosine_similarity(stored[named], spelled[named]) > SAME_NAME
        if alike.float().mean() < 0.99:
            raise UserError(
                f"'{self.start}' and {self.data.folder} have other names: {int((~alike).sum()):,} of "
                f"{len(alike):,} differ. Train recipe photo on these pictures, or build a folder with all of the "
                "start's."
            )

    def _spell(self) -> Tensor:
        """The tokens of each class's name, int64 [classes, pieces]; -1 behind its end and for what has no name."""
        pieces = self.config.vision.name_pieces
        tokens = torch.full((self.config.vision.num_classes, pieces), -1)
        spoken = dict(enumerate(self.data.names)) | {len(tokens) - 2: answers.UNKNOWN_THING}
        for number, name in spoken.items():
            ids = answer_ids(self.rows, name)[:pieces]
            tokens[number, : len(ids)] = torch.tensor(ids)
        return tokens

    def name_table(self) -> Tensor | None:
        """Embeddings [classes, pieces, H] of the names' tokens; gradients reach the embedding."""
        if not self.config.vision.name_pieces:
            return None
        spelling = self.spelling.to(self.model.memory_prior.device)
        return self.model.embed(spelling.clamp(min=0)) * (spelling >= 0)[..., None]

    @torch.no_grad()
    def store_names(self) -> None:
        """Bring the adapter's names up to date with the embedding."""
        table = self.name_table()
        if table is not None:
            cast(nn.Linear, self.model.adapter.names).weight.copy_(table.flatten(1).T)

    def result(self) -> nn.Module:
        self.store_names()
        return super().result()

    def virtual_pictures(self, rng: np.random.Generator) -> VirtualPictures | None:
        """Made of random training photographs; None if there are none."""
        if not len(self.data.photographs("train")):
            return None
        means = self.data.mean_features("train", rng, STATISTICS)
        return VirtualPictures(means, read_encoder(self.data.folder))

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
        parameters = [p for part in self.trained_parts() for p in part.parameters() if p.requires_grad]
        return [{"params": parameters, "lr": self.stage.learning_rate}]


def encoder_of(model: MicroVLM) -> EfficientNetLite:
    """The convolutional encoder of a model that has one."""
    return cast(EfficientNetLite, model.vision)


def answer_ids(rows: TextRows, answer: str) -> list[int]:
    """Tokens of an answer and the end token. It begins with a blank: a name then has the same tokens everywhere."""
    return rows.answer_ids(answer, after_blank=True)


def prefixes_of(
    model: MicroVLM, features: Tensor, is_told: Tensor | None = None, table: Tensor | None = None
) -> Tensor:
    """Prefix embeddings [B, k, H] of feature maps uint8 [B, F, S, S]; gradients reach the adapter.

    is_told : bool [B], pictures whose first token has class probabilities alone. table : `PhotoTask.name_table`.
    """
    encoder, device = encoder_of(model), model.memory_prior.device
    tokens = encoder.tokens(features.to(device)).detach()
    if is_told is not None:
        first = hide_features(tokens[:, :1], is_told.to(device), encoder.config.features_of_token)
        tokens = torch.cat([first, tokens[:, 1:]], 1)
    prefixes: Tensor = model.adapter(tokens, table)
    return prefixes


def hide_features(tokens: Tensor, is_told: Tensor, features: int) -> Tensor:
    """Tokens [B, n, features + colours + classes] with zeros for the features of the pictures `is_told`, bool [B].

    Colours stay: a made picture has those of a photograph, so they do not tell it from a real one.
    """
    seen = torch.where(is_told[:, None, None], torch.zeros(()).to(tokens), tokens[..., :features])
    return torch.cat([seen, tokens[..., features:]], -1)
