"""What a user wants smaller in an export, checked against a model's sizes. Imports no torch, so bad flags fail fast."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError


@dataclass(frozen=True)
class Smaller:
    """The flags of an export that leave parts of a model out. None and empty keep what there is."""

    layers: int | None = None
    """Decoder layers that stay."""
    slots: int | None = None
    """Slots of the memory that stay."""
    vocabulary: int | None = None
    """The most tokens that stay."""
    corpus: Path | None = None
    """Texts by whose use tokens are chosen, in place of the order of merges."""
    languages: tuple[str, ...] = ()
    """Languages by whose scripts tokens are chosen."""
    calibrate: Path | None = None
    """Texts that layers are chosen on, bits are fitted to and costs are measured on."""
    costs: bool = True
    """Whether costs are measured. Layers are chosen by measuring whatever this says."""

    @property
    def cuts_tokens(self) -> bool:
        return self.vocabulary is not None or bool(self.languages)

    @property
    def is_nothing(self) -> bool:
        """Whether the whole model stays."""
        return self.layers is None and self.slots is None and not self.cuts_tokens

    @property
    def suffix(self) -> str:
        """What the name of a bundle tells of it, such as -l20-v5000."""
        parts = (("l", self.layers), ("s", self.slots), ("v", self.vocabulary))
        cut = "".join(f"-{letter}{count}" for letter, count in parts if count is not None)
        return cut + "".join(f"-{language}" for language in self.languages)

    def require_sense(self) -> None:
        """Raise UserError for flags that need another one, whatever the model."""
        if self.corpus is not None and self.vocabulary is None:
            raise UserError("--corpus chooses which tokens stay: say how many with --vocabulary.")

    def sizes_of(self, config: MicroVLMConfig) -> MicroVLMConfig:
        """`config` with fewer layers and slots. Tokens are counted where the tokenizer is read.

        Raises UserError for numbers that this model cannot be cut to.
        """
        text, memory = config.text, config.memory
        if self.layers is not None:
            _require_fewer("--layers", self.layers, text.num_hidden_layers, "decoder layers")
            text = dataclasses.replace(text, num_hidden_layers=self.layers)
        if self.slots is not None:
            _require_fewer("--slots", self.slots, memory.slots, "memory slots")
            memory = dataclasses.replace(memory, slots=self.slots)
        return dataclasses.replace(config, text=text, memory=memory)


def _require_fewer(flag: str, wanted: int, present: int, what: str) -> None:
    if wanted < 1:
        raise UserError(f"{flag} {wanted} leaves no {what}: give at least 1.")
    if wanted >= present:
        raise UserError(f"{flag} {wanted} is not fewer than the {present} {what} that the model has.")


def with_vocabulary(config: MicroVLMConfig, tokens: int) -> MicroVLMConfig:
    """`config` with a table of so many tokens."""
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=tokens))
