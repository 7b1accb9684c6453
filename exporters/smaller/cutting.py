"""Leaves layers, slots and tokens out of a model, fits its bits to texts, and reports what each costs.

In the order layers, bits, slots, tokens: what is fitted is what stays, and neither slots nor tokens touch it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.exporters.calibration.calibrated_model import calibrate, is_fitted
from microvlm.exporters.smaller.layer_choice import choose_layers
from microvlm.exporters.smaller.model_cuts import with_slots, with_tokens, without_layers
from microvlm.exporters.smaller.samples import Facts, Samples, encode_facts, find_samples
from microvlm.exporters.smaller.slot_choice import principal_keys, recall
from microvlm.exporters.smaller.text_costs import compare
from microvlm.exporters.smaller.text_rows import Reader
from microvlm.exporters.vocabulary.shrink import SmallerVocabulary, shrink
from microvlm.exporters.vocabulary.token_map import first_tokens, token_bytes
from microvlm.formats.lowered_layer import LoweredLayer
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor import TOKENIZER, Processor
from microvlm.loaded_model import LoadedModel
from microvlm.model.checkpoint import describe_lowered
from microvlm.model.lowering import lower
from microvlm.model.microvlm import MicroVLM
from microvlm.sizes.smaller import Smaller
from microvlm.sizes.weight_bytes import weight_bytes

Log = Callable[[str], None]


@dataclass(frozen=True)
class Cut:
    """One thing that was made smaller."""

    what: str
    """layers, slots or vocabulary; bits where weights were fitted to texts, which saves nothing beside rounding."""
    before: int
    after: int
    predicted_saved_bytes: int
    """Of weights, counted from their types: what an export of the model before this cut has more."""
    costs: Mapping[str, float] | None
    """By name, see `text_costs.TextCosts`; `recall_before` and `recall_after` of slots. None where not measured."""
    measured_on: str | None
    kept: list[int] | None = None
    """Indices of the layers that stayed."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def sentence(self) -> str:
        """What was left out, what it saves and what it costs, for people."""
        costs = self.costs
        saved = f"{self.what} {self.before} -> {self.after}: {self.predicted_saved_bytes / 1e6:.2f} MB of weights less"
        if costs is None:
            return f"{self.after} bits fitted to texts" if self.what == "bits" else saved
        if self.what == "slots":
            price = f"recall {costs['recall_before']:.3f} -> {costs['recall_after']:.3f} of {costs['facts']:.0f} facts"
        else:
            price = (
                f"KL {costs['kl']:.4f}, top-1 {costs['top1']:.3f}, perplexity {costs['perplexity_before']:.2f} -> "
                f"{costs['perplexity_after']:.2f}"
            )
            if self.what == "bits":
                rounding = f"KL {costs['kl_of_rounding']:.4f} by rounding"
                return f"{self.after} bits fitted to {self.measured_on}: {price}; {rounding}"
            if self.what == "vocabulary":
                price += f", {costs['tokens_after'] / max(costs['tokens'], 1):.2f} tokens for each"
        return f"{saved}; {price} (on {self.measured_on})"


class CutModel(NamedTuple):
    """A model with less in it."""

    model: MicroVLM
    vocabulary: SmallerVocabulary | None
    cuts: list[Cut]


def cut_model(
    model: MicroVLM, directory: Path, smaller: Smaller, weights: WeightFormat, log: Log
) -> CutModel:
    """`model`, loaded from `directory`, cut as `smaller` says; `weights` are the format that savings are counted in.

    Raises UserError for numbers that it cannot be cut to, and for texts and corpora that cannot be read.
    """
    smaller.require_sense()
    smaller.sizes_of(model.config)
    vocabulary = shrink(directory, model.config, smaller) if smaller.cuts_tokens else None
    if smaller.is_nothing:
        if smaller.calibrate is None:
            return CutModel(model, None, [])
        if weights.bits not in (8, 4):
            raise UserError(
                "--calibrate has nothing to calibrate here: give --bits 8 or 4, --layers, --slots or --vocabulary."
            )
        if not is_fitted(model):
            raise UserError(
                "--calibrate fits the weights of a float decoder, and this one has none: leave it out, because its "
                "integers are stored exactly."
            )
    return _Cutter(model, directory, smaller, weights, log).run(vocabulary)


@dataclass
class _Cutter:
    model: MicroVLM
    directory: Path
    smaller: Smaller
    weights: WeightFormat
    log: Log
    cuts: list[Cut] = field(default_factory=list)

    def run(self, vocabulary: SmallerVocabulary | None) -> CutModel:
        smaller = self.smaller
        samples = processor = latents = None
        fits = smaller.calibrate is not None and self.weights.bits in (8, 4) and is_fitted(self.model)
        if smaller.costs or fits or smaller.layers is not None or smaller.slots is not None:
            loaded = self._load()
            processor, slots = loaded.processor, self.model.config.memory.slots
            texts = smaller.calibrate or smaller.corpus
            facts = 2 * slots if smaller.slots is not None else 0
            samples = find_samples(loaded.runtime, processor, texts, facts)
            # Latents are made by the encoder, which no cut changes.
            latents = encode_facts(loaded.runtime, processor, samples.facts) if facts else None
        if smaller.layers is not None and samples and processor:
            self._layers(samples, processor, smaller.layers)
        if fits and samples and processor:
            self._fit(samples, processor)
        if smaller.slots is not None and samples and latents:
            self._slots(latents, samples.origin, smaller.slots)
        if vocabulary is not None:
            self._tokens(samples, processor, vocabulary)
        return CutModel(self.model, vocabulary, self.cuts)

    def _load(self) -> LoadedModel:
        if not (self.directory / TOKENIZER).is_file():
            raise UserError(
                f"{self.directory} has no {TOKENIZER}, so nothing can be measured: leave out --layers and --slots."
            )
        return self.model.to_loaded_model()

    def _layers(self, samples: Samples, processor: Processor, count: int) -> None:
        before = Reader(self.model, processor)
        kept = choose_layers(before, samples.choose, count, self.log)
        after = without_layers(self.model, kept)
        costs = None
        if self.smaller.costs:
            costs = compare(before, Reader(after, processor), samples.measure)._asdict()
        total = self.model.config.text.num_hidden_layers
        self._done("layers", total, count, after, costs, samples.origin, kept)

    def _fit(self, samples: Samples, processor: Processor) -> None:
        before = Reader(self.model, processor)
        after = calibrate(before, samples.calibrate, self.weights.bits, self.log)
        costs = None
        if self.smaller.costs:
            fitted, rounded = (Reader(lower(model, self.weights), processor) for model in (after, self.model))
            costs = compare(before, fitted, samples.measure)._asdict()
            costs["kl_of_rounding"] = compare(before, rounded, samples.measure).kl
        self._done("bits", 32, int(self.weights.bits), after, costs, samples.origin, saved=0)

    def _slots(self, latents: Facts, origin: str, count: int) -> None:
        held_out = Facts(latents.cues[1::2], latents.values[1::2])
        after = with_slots(self.model, principal_keys(self.model, latents.cues[0::2], count))
        costs = None
        if self.smaller.costs:
            costs = {
                "recall_before": recall(self.model, held_out),
                "recall_after": recall(after, held_out),
                "facts": len(held_out.cues),
            }
        self._done("slots", self.model.config.memory.slots, count, after, costs, origin)

    def _tokens(
        self, samples: Samples | None, processor: Processor | None, vocabulary: SmallerVocabulary
    ) -> None:
        after = with_tokens(self.model, vocabulary.old_ids)
        costs, origin = None, ""
        if self.smaller.costs and samples and processor:
            document = json.loads((self.directory / TOKENIZER).read_bytes())
            sizes = token_bytes(document, vocabulary.old_size)
            first = torch.from_numpy(first_tokens(document, vocabulary.old_ids, vocabulary.old_size))
            smaller = Reader(after, _processor(vocabulary, after.config), sizes[vocabulary.old_ids])
            costs = compare(Reader(self.model, processor, sizes), smaller, samples.measure, first)._asdict()
            origin = samples.origin
        self._done("vocabulary", vocabulary.old_size, len(vocabulary.old_ids), after, costs, origin)

    def _done(
        self,
        what: str,
        before: int,
        count: int,
        after: MicroVLM,
        costs: Mapping[str, float] | None,
        origin: str,
        kept: list[int] | None = None,
        saved: int | None = None,
    ) -> None:
        if saved is None:
            saved = self._weight_bytes(self.model) - self._weight_bytes(after)
        measured_on = origin if costs is not None else None
        self.cuts.append(Cut(what, before, count, saved, costs, measured_on, kept))
        self.model = after

    def _weight_bytes(self, model: MicroVLM) -> int:
        layers: Mapping[str, LoweredLayer] = describe_lowered(model)
        return weight_bytes(model.config, layers, self.weights)


def _processor(vocabulary: SmallerVocabulary, config: MicroVLMConfig) -> Processor:
    documents = {name: json.loads(text) for name, text in vocabulary.documents.items() if name != TOKENIZER}
    return Processor(Tokenizer.from_str(vocabulary.documents[TOKENIZER]), config, documents)
