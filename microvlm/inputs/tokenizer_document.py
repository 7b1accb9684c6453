"""The parts of a tokenizer.json that this package reads itself, as typed records. The file belongs to `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from microvlm.formats import documents

MAX_TOKENIZER_BYTES = documents.MAX_DOCUMENT_BYTES
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TokenText = Annotated[str, Meta(min_length=1)]
_REMEDY = "copy the checkpoint or bundle again"


class AddedToken(Struct, frozen=True):
    """A token that is matched before a text is split into words."""

    id: TokenId
    content: TokenText
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Step(Struct, frozen=True):
    """A normalizer, pre-tokenizer, post-processor or decoder, or a sequence of them."""

    type: str
    normalizers: tuple[Step, ...] = ()
    pretokenizers: tuple[Step, ...] = ()
    processors: tuple[Step, ...] = ()
    decoders: tuple[Step, ...] = ()
    pattern: dict[str, str] | str | None = None
    behavior: str = ""
    invert: bool = False
    use_regex: bool = True
    add_prefix_space: bool = False
    individual_digits: bool = False
    single: Any = None

    def parts(self) -> tuple[Step, ...]:
        """The steps of a sequence, or the step itself."""
        listed = (*self.normalizers, *self.pretokenizers, *self.processors, *self.decoders)
        return listed if self.type == "Sequence" else (self,)

    @property
    def expression(self) -> str:
        """The regular expression of this step; empty without one."""
        return self.pattern.get("Regex", "") if isinstance(self.pattern, dict) else ""

    def expressions(self) -> Iterator[str]:
        """The regular expressions of this step and of the steps in it."""
        if self.expression:
            yield self.expression
        for part in (*self.normalizers, *self.pretokenizers, *self.processors, *self.decoders):
            yield from part.expressions()


class BpeModel(Struct, frozen=True):
    """A model of the type BPE. Older files write a merge as one string."""

    vocab: dict[str, TokenId]
    merges: tuple[str | tuple[str, str], ...]
    ignore_merges: bool = False


class ModelOptions(Struct, frozen=True):
    """The type of a model and the options of BPE."""

    type: str | None = None
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool = False


class TokenizerDocument(Struct, frozen=True):
    """tokenizer.json. `model` is parsed by its type: `options` and `bpe`."""

    model: msgspec.Raw
    added_tokens: tuple[AddedToken, ...] = ()
    normalizer: Step | None = None
    pre_tokenizer: Step | None = None
    post_processor: Step | None = None
    decoder: Step | None = None

    def options(self, origin: object) -> ModelOptions:
        """Raises UserError."""
        return documents.parse(bytes(self.model), ModelOptions, f"{origin} (its model)", _REMEDY)

    def bpe(self, origin: object) -> BpeModel:
        """Raises UserError."""
        return documents.parse(bytes(self.model), BpeModel, f"{origin} (its model)", _REMEDY)

    def expressions(self) -> Iterator[str]:
        """The regular expressions of all steps."""
        for step in (self.normalizer, self.pre_tokenizer, self.post_processor, self.decoder):
            if step is not None:
                yield from step.expressions()


def parse_tokenizer(content: bytes, origin: object) -> TokenizerDocument:
    """Parse a tokenizer.json. Raises UserError, one sentence with the name of the key."""
    return documents.parse(content, TokenizerDocument, origin, _REMEDY)


def merge_pairs(merges: Any) -> list[tuple[str, str]]:
    """Merges in rank order, each as (left, right). Raises ValueError for a string that is not two words."""
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in split]
