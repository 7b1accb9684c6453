"""A smaller vocabulary for a checkpoint: the bytes, the best merges, the added tokens that its files speak of.

Which merges are best is `token_order`'s matter. Each is kept only with both its parts and in its rank, so a text whose
tokens are all kept is cut as before: every merge that built them is kept, and no other merge comes before one of them.
Any text that the whole vocabulary writes can still be written, because the bytes stay. Needs `tokenizers` and no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.exporters.vocabulary.table_builder import byte_of_letter, require_plain_bpe
from microvlm.exporters.vocabulary.token_order import Pair, order_merges, scripts_of
from microvlm.formats import documents
from microvlm.inputs.processor import GENERATION, TOKENIZER, TOKENIZER_CONFIG, Processor
from microvlm.inputs.text_data import open_texts
from microvlm.inputs.tokenizer import read_tokenizer
from microvlm.inputs.tokenizer_document import merge_pairs, parse_tokenizer
from microvlm.inputs.tokenizer_patterns import Inexpressible
from microvlm.sizes.smaller import Smaller

COUNTED = 50_000
"""Most texts of a corpus whose tokens are counted."""
_NEEDED_BYTES = frozenset([*range(0x20, 0x7F), *range(0x80, 0xC0)])
"""Of visible ASCII and inside of longer characters: a vocabulary without them is no byte-level one."""


@dataclass(frozen=True)
class SmallerVocabulary:
    """`old_ids[new id]` is the old id, ascending. `documents`: the rewritten files by name."""

    old_ids: list[int]
    old_size: int
    merges: int
    documents: dict[str, str]

    def describe(self) -> dict[str, int]:
        """Returns the manifest's entry: tokens kept, tokens before, merges kept."""
        return {"tokens": len(self.old_ids), "of": self.old_size, "merges": self.merges}


def shrink(directory: Path, config: MicroVLMConfig, smaller: Smaller) -> SmallerVocabulary:
    """The vocabulary of the checkpoint `directory` cut as `smaller` says: to a number, to scripts, or to both.

    Raises UserError when its tokenizer is not a byte-level BPE, when the number is too few or no fewer than there are,
    for an unknown language, and for a corpus that cannot be read.
    """
    flag = "--language" if smaller.vocabulary is None else f"--vocabulary {smaller.vocabulary}"
    scripts = scripts_of(smaller.languages) if smaller.languages else None
    files = {name: _read(directory / name) for name in (TOKENIZER, TOKENIZER_CONFIG, GENERATION)}
    raw = files[TOKENIZER]
    if raw is None:
        raise UserError(f"{flag.partition(' ')[0]} needs {TOKENIZER} in {directory}, which is missing.")
    try:
        _require_bytes_and_merges(directory / TOKENIZER)
        needed, old_size = _needed(files, config), config.text.vocab_size
        size = old_size if smaller.vocabulary is None else smaller.vocabulary
        _require_possible(raw, needed, old_size, size, smaller)
        uses = None if smaller.corpus is None else _count(directory, smaller.corpus)
        order = order_merges(raw["model"], uses, scripts)
        old_ids = _choose(raw, needed, old_size, size, order)
        documents = _rewrite(files, {old: new for new, old in enumerate(old_ids)})
    except Inexpressible as reason:
        raise UserError(f"{flag} is for byte-level BPE: {reason}.") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{directory / TOKENIZER} is damaged: copy the checkpoint again.") from None
    if len(old_ids) == old_size:
        raise UserError(f"{flag} leaves out none of the {old_size} tokens that the model has.")
    merges = len(json.loads(documents[TOKENIZER])["model"]["merges"])
    return SmallerVocabulary(old_ids, old_size, merges, documents)


def _count(directory: Path, corpus: Path) -> Counter[int]:
    """How often each token is in the training part of a corpus; costs are measured on the rest. Raises UserError."""
    texts, processor = open_texts(corpus).train, Processor.from_pretrained(directory)
    uses: Counter[int] = Counter()
    for text in texts[:: -(-len(texts) // COUNTED)]:
        uses.update(processor.text_ids(text[: processor.config.text.max_position_embeddings]))
    return uses


def _require_bytes_and_merges(path: Path) -> None:
    """Raise Inexpressible unless the tokenizer is a plain byte-level BPE, and UserError for a damaged file.

    Some real ones, such as SmolLM2's, lack bytes that no text of theirs had: control characters, planes of Unicode.
    """
    document = parse_tokenizer(read_tokenizer(path), path)
    require_plain_bpe(document.options(path))
    vocab = document.bpe(path).vocab
    if any(letter not in vocab for letter, byte in byte_of_letter().items() if byte in _NEEDED_BYTES):
        raise Inexpressible("its vocabulary lacks some byte")


def _needed(files: dict[str, Any], config: MicroVLMConfig) -> set[int]:
    """Ids of the added tokens that the prompt, or any file beside the tokenizer, speaks of."""
    raw = files[TOKENIZER]
    added = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
    prompt, settings = config.prompt, files[TOKENIZER_CONFIG] or {}
    spoken = [prompt.template, prompt.image_token, prompt.eos_token, prompt.pad_token]
    for key, value in settings.items():
        if key.endswith("_token"):
            spoken.append(value["content"] if isinstance(value, dict) else str(value))
    prompt_tokens = {number for content, number in added.items() if any(content in text for text in spoken)}
    listed = {number for _, ids in _token_ids(files[GENERATION] or {}) for number in ids}
    return (
        prompt_tokens
        | listed
        | {n for entry in _template_tokens(raw.get("post_processor")) for n in entry["ids"]}
    )


def _always_kept(raw: dict[str, Any], needed: set[int]) -> set[int]:
    vocab = raw["model"]["vocab"]
    return {vocab[letter] for letter in byte_of_letter() if letter in vocab} | needed


def _require_possible(
    raw: dict[str, Any], needed: set[int], old_size: int, size: int, smaller: Smaller
) -> None:
    if smaller.vocabulary is not None and size >= old_size:
        raise UserError(f"--vocabulary {size} is not fewer than the {old_size} tokens that the model has.")
    least = len(_always_kept(raw, needed))
    if size < least:
        raise UserError(
            f"--vocabulary {size} is too few: the bytes and the tokens of the prompt take {least}."
        )


def _choose(raw: dict[str, Any], needed: set[int], old_size: int, size: int, order: list[Pair]) -> list[int]:
    vocab = raw["model"]["vocab"]
    kept_ids = _always_kept(raw, needed)
    for left, right in order:
        if len(kept_ids) == size:
            break
        if vocab[left] in kept_ids and vocab[right] in kept_ids:
            kept_ids.add(vocab[left + right])
    if max(kept_ids) >= old_size:
        raise UserError(
            f"the tokenizer has a token {max(kept_ids)} and the model {old_size} rows: they belong to different models."
        )
    return sorted(kept_ids)


def _rewrite(files: dict[str, Any], new_id: dict[int, int]) -> dict[str, str]:
    """The three files with the ids of `new_id` (old -> new), what is not in it left out."""
    raw, settings, generation = files[TOKENIZER], files[TOKENIZER_CONFIG], files[GENERATION]
    model = raw["model"]
    vocab = {token: new_id[old] for token, old in model["vocab"].items() if old in new_id}
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    merges = [
        f"{left} {right}" if as_text else [left, right]
        for left, right in merge_pairs(model["merges"])
        if left in vocab and right in vocab and left + right in vocab
    ]
    added = [
        {**token, "id": new_id[token["id"]]} for token in raw.get("added_tokens", []) if token["id"] in new_id
    ]
    for entry in _template_tokens(raw.get("post_processor")):
        entry["ids"] = [new_id[old] for old in entry["ids"]]
    rewritten = {**raw, "added_tokens": added, "model": {**model, "vocab": vocab, "merges": merges}}
    documents = {TOKENIZER: json.dumps(rewritten, ensure_ascii=False, separators=(",", ":"))}
    if settings is not None:
        documents[TOKENIZER_CONFIG] = json.dumps(_rewrite_settings(settings, new_id, added), indent=2) + "\n"
    if generation is not None:
        for key, ids in _token_ids(generation):
            renumbered = [new_id[old] for old in ids]
            generation[key] = renumbered if isinstance(generation[key], list) else renumbered[0]
        documents[GENERATION] = json.dumps(generation, indent=2) + "\n"
    return documents


def _rewrite_settings(
    settings: dict[str, Any], new_id: dict[int, int], added: list[dict[str, Any]]
) -> dict[str, Any]:
    contents = {token["content"] for token in added}
    rewritten = dict(settings)
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"].items()
        rewritten["added_tokens_decoder"] = {
            str(new_id[int(old)]): token for old, token in listed if int(old) in new_id
        }
    if isinstance(settings.get("additional_special_tokens"), list):
        extra = settings["additional_special_tokens"]
        rewritten["additional_special_tokens"] = [token for token in extra if token in contents]
    return rewritten


def _token_ids(generation: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """(key, ids) of everything in generation_config.json that is a token or several."""
    for key in list(generation):
        value = generation[key]
        if key.endswith("_token_id") and value is not None:
            yield key, list(value) if isinstance(value, list) else [value]


def _template_tokens(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Entries with `ids` of a post-processor; the library puts these tokens around a text when asked to."""
    kind = processor["type"] if processor else "ByteLevel"
    if processor and kind == "Sequence":
        for part in processor["processors"]:
            yield from _template_tokens(part)
    elif processor and kind == "TemplateProcessing":
        yield from processor["special_tokens"].values()
    elif kind != "ByteLevel":
        raise Inexpressible(f"its post-processor is {kind}")


def _read(path: Path) -> Any:
    """A JSON object, whose unknown keys are kept, or None where there is no file. Raises UserError."""
    try:
        return documents.load(path, dict[str, Any], "copy the checkpoint again")
    except FileNotFoundError:
        return None
