"""Stage `photo-classes`: the encoder's classifiers learn every name of the data, before a decoder says them.

The classifier that the encoder was trained with gives the first weights of the names that it knows. Photographs and
drawings teach the other names. A name of its own that none of them shows keeps its weights in the classifier of whole
pictures: trained with the others, it had lost an eighth of ImageNet's sample photographs. That the others leave its
pictures alone, features that are moved along its own directions (`virtual_pictures`) teach: they must be told as it
tells them. What has no name is a class, and so is a window of the ground.

The adapter's columns of classes begin as the embeddings of their names' first tokens, so that a decoder that copies
what it sees in the prefix already says the name.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.model.microvlm import MicroVLM
from microvlm.model.pretrained.float_weights import float_weights
from microvlm.training.photo.batches.class_targets import ALONE, NAMELESS, UNTOLD, Classes
from microvlm.training.photo.batches.virtual_pictures import VirtualPictures
from microvlm.training.photo.data.class_names import class_names
from microvlm.training.photo.data.encoder import read_encoder
from microvlm.training.photo.stages.photo_task import PhotoTask, encoder_of
from microvlm.training.stages.task import StageInputs

NAMELESS_SHARE, SCENE_SHARE = 0.18, 0.24
"""Shares of a batch without a name, and with several things; the others show one thing with a name."""
VIRTUAL, VIRTUAL_WEIGHT = 128, 1.0
UNKNOWN_OFFSET, UNSHOWN_OFFSET = 2.0, -0.5
"""Added in training to the logits of the unknown and of names that no picture shows (Menon et al. 2021, arXiv
2007.07314): by odds a batch has some seven times as many pictures without a name as people show, and of a name that
only virtual pictures have two thirds as many as of another."""
WINDOWS, GROUND_SHARE = 512, 0.2
"""Most windows of a batch that are classified, and the share of those of the ground that are."""
TRAINED_SHARE = 0.5
"""Share of the trained weights of whole pictures in what a run that started from a checkpoint ends with; the rest are
those that it started from. Half-way between two classifiers more is right than at either end, taken over the pictures
that training shows and those that it does not (WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903). It was chosen with the
scores of ImageNet's sample photographs in view."""
BRIGHTER = 0.15
"""Features are scaled by a random factor of 1 - BRIGHTER to 1 + BRIGHTER."""
UNUSED_BIAS = -30.0
"""Bias of classes that no name has."""
NAME_SPREAD = 0.2
"""Standard deviation of a name's first column of the adapter."""


class ClassBatch(NamedTuple):
    """Pictures with their classes, and features of virtual ones."""

    features: Tensor
    """uint8 [B, F, S, S]."""
    classes: Tensor
    """int64 [B], UNTOLD for several things."""
    windows: Tensor
    """int64 [B, windows], UNTOLD where no class is learnt."""
    virtual: Tensor
    """float32 [VIRTUAL, F], mean features; no rows if there are no photographs."""
    told: Tensor
    """float32 [VIRTUAL, classes], probabilities."""
    brightness: Tensor
    """float32 [B], factors of the features."""


class ClassifyTask(PhotoTask):
    """Cross-entropy of the classes of pictures and of windows."""

    def __init__(self, inputs: StageInputs):
        super().__init__(inputs)
        self.classes = Classes.of(self.data.names, self.config.vision.num_classes)
        self.own = [self.classes.numbers[name.lower()] for name in class_names()]
        self._begin()
        self._pools: list[np.ndarray] = []
        self._parts = self.data.named_parts
        self._virtual: VirtualPictures | None = None
        self._offset = torch.zeros(self.config.vision.num_classes)
        first = encoder_of(self.model).classifier
        self._first = first.weight.detach().clone(), first.bias.detach().clone()
        self._keeps_first = torch.zeros(self.config.vision.num_classes, dtype=torch.bool)

    def trained_parts(self) -> list[nn.Module]:
        return [encoder_of(self.model).classifier, encoder_of(self.model).window_classifier]

    @torch.no_grad()
    def _begin(self) -> None:
        """Both classifiers begin with the directions that the encoder's own has for these names."""
        encoder, packaged = encoder_of(self.model), read_encoder(self.data.folder)
        count, width = encoder.classifier.weight.shape
        weight, bias = torch.zeros(count, width), torch.full((count,), UNUSED_BIAS)
        bias[[*range(len(self.data.names)), self.classes.unknown, self.classes.nothing]] = -1.0
        own, shared = torch.tensor(self.own), torch.zeros(count)
        shared.index_add_(0, own, torch.ones(len(own)))
        bias[own] = 0.0
        # A few of its classes share a name: that begins as their mean.
        weight.index_add_(0, own, packaged["classifier.weight"].float() / shared[own, None])
        bias.index_add_(0, own, packaged["classifier.bias"].float() / shared[own])
        for classifier in (encoder.classifier, encoder.window_classifier):
            classifier.weight.copy_(weight)
            classifier.bias.copy_(bias)
        cast(nn.Linear, self.model.adapter.classes).weight.copy_(self._name_columns().T)

    def _name_columns(self) -> Tensor:
        """The adapter's first column of each class [classes, H]: the embeddings of the name's tokens, the second one
        rotated by a head's width, the third by two, so that they can be told apart; zero for classes without a name."""
        table = self.model.embedding.weight.detach()
        head = self.config.text.head_dim
        columns = torch.zeros(self.config.vision.num_classes, table.shape[1])
        for column, spelling in zip(columns, self.spelling.tolist(), strict=True):
            tokens = [token for token in spelling if token >= 0]
            for place, token in enumerate(tokens):
                column += table[token].roll(head * place)
            if tokens:
                column *= NAME_SPREAD / column.std()
        return columns

    def prepare(self) -> None:
        super().prepare()
        places = [
            (part, row, description)
            for part, name in enumerate(self._parts)
            for row, description in enumerate(self.data.descriptions(name))
        ]
        named = [(part, row) for part, row, d in places if d.kind in ALONE]
        nameless = [(part, row) for part, row, d in places if d.kind in NAMELESS]
        scenes = [(part, row) for part, row, d in places if d.kind not in (*ALONE, *NAMELESS)]
        self._pools = [np.array(pool, np.int64).reshape(-1, 2) for pool in (named, nameless, scenes)]
        shown = {
            self.classes.numbers[thing.name.lower()] for *_, d in places for thing in d.things if thing.name
        }
        unshown = [number for number in range(len(self.data.names)) if number not in shown]
        self._keeps_first[unshown] = True
        self._offset[unshown] = UNSHOWN_OFFSET
        self._offset[self.classes.unknown] = UNKNOWN_OFFSET
        self._virtual = self.virtual_pictures(np.random.default_rng(self.recipe.seed))

    def draw(self, generator: torch.Generator) -> ClassBatch:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        size = self.stage.batch_size
        nameless, scenes = round(size * NAMELESS_SHARE), round(size * SCENE_SHARE)
        counts = (size - nameless - scenes, nameless, scenes)
        chosen = np.concatenate(
            [
                pool[rng.integers(len(pool), size=count)]
                for pool, count in zip(self._pools, counts, strict=True)
                if len(pool)
            ]
        )
        features, classes, windows = self._pictures(chosen)
        ground = (windows == self.classes.nothing) & (rng.random(windows.shape) >= GROUND_SHARE)
        windows[ground] = UNTOLD
        told = np.flatnonzero(windows.reshape(-1) != UNTOLD)
        windows.reshape(-1)[rng.permutation(told)[WINDOWS:]] = UNTOLD
        virtual, probabilities = torch.zeros(0, 0), torch.zeros(0, 0)
        if self._virtual is not None:
            real = self._virtual.features
            of = torch.from_numpy(rng.integers(len(real), size=VIRTUAL))
            virtual, of_own = self._virtual.means(real[of], rng)
            probabilities = torch.zeros(VIRTUAL, self.config.vision.num_classes)
            probabilities.index_add_(1, torch.tensor(self.own), of_own)
        brightness = torch.from_numpy(rng.uniform(1 - BRIGHTER, 1 + BRIGHTER, len(features))).float()
        return ClassBatch(features, classes, torch.from_numpy(windows), virtual, probabilities, brightness)

    def _pictures(self, chosen: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
        """Rows (part, picture) -> features, classes and those of windows."""
        features = np.concatenate(
            [self.data.features(self._parts[part], np.array([row])) for part, row in chosen]
        )
        shown = [self.data.descriptions(self._parts[part])[row] for part, row in chosen]
        classes = torch.tensor([self.classes.of_picture(d) for d in shown])
        side = features.shape[-1] // 2
        return (
            torch.from_numpy(features),
            classes,
            np.stack([self.classes.of_windows(d, side) for d in shown]),
        )

    def size(self, batch: ClassBatch) -> tuple[int, int]:
        return len(batch.features), 0

    def _whole(self, classifier: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weights and biases of whole pictures, those of names that no picture shows as they began."""
        weight, bias = self._first
        keeps = self._keeps_first.to(classifier.weight.device)
        return (
            torch.where(keeps[:, None], weight.to(keeps.device), classifier.weight),
            torch.where(keeps, bias.to(keeps.device), classifier.bias),
        )

    @torch.no_grad()
    def _store(self) -> None:
        """Undo what an optimizer's weight decay did to weights that are kept."""
        classifier = encoder_of(self.model).classifier
        weight, bias = self._whole(classifier)
        classifier.weight.copy_(weight)
        classifier.bias.copy_(bias)

    @torch.no_grad()
    def result(self) -> nn.Module:
        self._store()
        trained = super().result()
        if self.start is None:
            return trained
        # A copy: the stage may go on.
        model, begun = copy.deepcopy(cast(MicroVLM, trained)), float_weights(str(self.start))
        for name, tensor in encoder_of(model).classifier.named_parameters():
            tensor.lerp_(begun[f"vision.classifier.{name}"].to(tensor.device), 1 - TRAINED_SHARE)
        return model

    def loss(self, module: MicroVLM, batch: ClassBatch) -> tuple[Tensor, dict[str, Tensor]]:
        encoder = encoder_of(module)
        means = encoder.class_features(batch.features.to(encoder.pooling.device).float())
        means = means * batch.brightness.to(means.device)[:, None, None]
        told, window_told = (part.to(means.device) != UNTOLD for part in (batch.classes, batch.windows))
        classes, window_classes = (
            batch.classes.to(means.device)[told],
            batch.windows.to(means.device)[window_told],
        )
        whole = self._whole(encoder.classifier)
        # In float: weights rounded to eight bits would change few logits and triple a step's time.
        logits = F.linear(means[:, 0][told], *whole)
        windows = encoder.window_classifier
        window_logits = F.linear(means[:, 1:][window_told], windows.weight, windows.bias)
        smoothing = self.stage.label_smoothing
        offset = self._offset.to(logits.device)
        loss = F.cross_entropy(logits + offset, classes, label_smoothing=smoothing)
        loss_windows = F.cross_entropy(window_logits, window_classes, label_smoothing=smoothing)
        total = loss + loss_windows
        metrics = {
            "whole": loss,
            "windows": loss_windows,
            "accuracy": (logits.argmax(-1) == classes).float().mean(),
            "window_accuracy": (window_logits.argmax(-1) == window_classes).float().mean(),
        }
        if len(batch.virtual):
            virtual = F.linear(batch.virtual.to(means.device), *whole)
            said = (virtual + offset).log_softmax(-1)
            metrics["virtual"] = -(batch.told.to(means.device) * said).sum(-1).mean()
            total = total + VIRTUAL_WEIGHT * metrics["virtual"]
        return total, metrics

    def evaluate(self, run: Path, step: int) -> dict[str, float]:
        """The share of calibration pictures and of windows of things whose class is right, by kind of picture."""
        self._store()
        encoder = encoder_of(self.model)
        right: dict[str, list[Tensor]] = {}
        losses = []
        descriptions = self.data.descriptions("calibration")
        for start in range(0, len(descriptions), 64):
            shown = descriptions[start : start + 64]
            features = self.data.features("calibration", np.arange(start, start + len(shown)))
            means = encoder.class_features(torch.from_numpy(features).to(encoder.pooling.device).float())
            whole, windows = encoder.classifier(means[:, 0]), encoder.window_classifier(means[:, 1:])
            for row, description in enumerate(shown):
                wanted = self.classes.of_picture(description)
                if wanted != UNTOLD:
                    right.setdefault(description.kind, []).append((whole[row].argmax() == wanted).float())
                    losses.append(F.cross_entropy(whole[row], torch.tensor(wanted, device=whole.device)))
                shares = torch.from_numpy(self.classes.of_windows(description, features.shape[-1] // 2))
                things = (shares != UNTOLD) & (shares != self.classes.nothing)
                if things.any() and description.kind not in NAMELESS:
                    found = windows[row].argmax(-1).cpu()[things] == shares[things]
                    right.setdefault(f"windows/{description.kind}", []).append(found.float().mean())
        scores = {f"evaluation/{kind}": float(torch.stack(values).mean()) for kind, values in right.items()}
        return {**scores, "evaluation/loss": float(torch.stack(losses).mean()) if losses else 0.0}
