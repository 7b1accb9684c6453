"""The tokenizer of a pretrained decoder: its files, with an image token, and the prompt that belongs to them.

Works on the text of tokenizer.json; the tokenizers library runs only what `tokenizer_steps` allows. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from microvlm.config import CONFIG, PromptConfig
from microvlm.errors import UserError
from microvlm.formats import documents
from microvlm.formats.headers.gguf_header import GgufHeader
from microvlm.inputs.processor_files import GENERATION, TOKENIZER_CONFIG
from microvlm.inputs.tokenizer import TOKENIZER, read_tokenizer
from microvlm.inputs.tokenizer_document import TokenId, TokenizerDocument, parse_tokenizer
from microvlm.model.pretrained.gguf_tokenizer import added_token, gguf_tokenizer
from microvlm.model.pretrained.prompts import derive_prompt

_REMEDY = "copy the decoder again"
_CHAT_FILE = "chat_template.jinja"
_MOST_TEMPLATE_BYTES = 1_000_000


class _Ends(msgspec.Struct, frozen=True):
    """What config.json and generation_config.json say of special tokens."""

    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None

    @property
    def ids(self) -> list[int]:
        """The ids that end a text."""
        ends = self.eos_token_id
        return [] if ends is None else ends if isinstance(ends, list) else [ends]


class _Vocabulary(msgspec.Struct, frozen=True):
    """The tokens of a tokenizer's model: ids by text, or a list in the order of ids."""

    vocab: dict[str, TokenId] | list[Any] = {}


class DecoderTokenizer(NamedTuple):
    """What an assembled model takes over from its decoder's tokenizer."""

    document: bytes
    """The content of tokenizer.json, with the image token."""
    config: dict[str, Any]
    """The content of tokenizer_config.json, with the chat template."""
    end_ids: list[int]
    """Ids that end an answer."""
    vocab_size: int
    """One more than the largest id."""
    prompt: PromptConfig


def read_decoder_tokenizer(source: Path | GgufHeader, template: str | None = None) -> DecoderTokenizer:
    """The tokenizer of a Hugging Face folder or of a GGUF file. Raises UserError; `template` as for `derive_prompt`."""
    if isinstance(source, GgufHeader):
        document, config = gguf_tokenizer(source)
        return _complete(document, config, [], source.path, template)
    path = source / TOKENIZER
    if not path.is_file():
        raise UserError(f"{path} is missing: the decoder's folder must hold its tokenizer.")
    records = [_optional(source / name, _Ends) or _Ends() for name in (GENERATION, CONFIG)]
    ends = next((record.ids for record in records if record.ids), [])
    config = _optional(source / TOKENIZER_CONFIG, dict[str, Any]) or {}
    chat = _chat_template(source, config)
    if chat is not None:
        config = {**config, "chat_template": chat}
    return _complete(read_tokenizer(path), config, ends, path, template)


def _complete(
    document: bytes, config: dict[str, Any], end_ids: list[int], path: Path, template: str | None
) -> DecoderTokenizer:
    content = parse_tokenizer(document, path)
    added = {token.content: token.id for token in content.added_tokens}
    texts = {number: text for text, number in added.items()}
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    ends = [texts[number] for number in end_ids if number in texts]
    prompt = derive_prompt(config, added, [*ends, *([eos] if isinstance(eos, str) else [])], template)
    last = max([*_model_ids(content, path), *added.values()], default=-1)
    if prompt.image_token not in added:
        last += 1
        document = _with_token(document, added_token(last, prompt.image_token), path)
    # A config.json that was cut down from a larger model's may name ids that no text has.
    ids = [added[prompt.eos_token], *(number for number in end_ids if number <= last)]
    return DecoderTokenizer(document, config, list(dict.fromkeys(ids)), last + 1, prompt)


def _model_ids(content: TokenizerDocument, path: Path) -> Iterable[int]:
    """The ids of the tokens that texts are split into."""
    vocabulary = documents.parse(bytes(content.model), _Vocabulary, f"{path} (its model)", _REMEDY).vocab
    return vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))


def _with_token(document: bytes, token: dict[str, Any], path: Path) -> bytes:
    """tokenizer.json with one more added token."""
    raw = documents.parse(document, dict[str, Any], path, _REMEDY)
    raw["added_tokens"] = [*raw.get("added_tokens", []), token]
    return json.dumps(raw, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template of a folder: a file, a text in tokenizer_config.json, or the `default` of a list there."""
    try:
        return documents.read_file(folder / _CHAT_FILE, _MOST_TEMPLATE_BYTES).decode()
    except FileNotFoundError:
        pass
    except UnicodeDecodeError:
        raise UserError(f"{folder / _CHAT_FILE} is not UTF-8: {_REMEDY}.") from None
    chat = config.get("chat_template")
    if isinstance(chat, list):
        named = {each.get("name"): each.get("template") for each in chat if isinstance(each, dict)}
        chat = named.get("default")
    return chat if isinstance(chat, str) else None


def _optional(path: Path, kind: Any) -> Any:
    try:
        return documents.load(path, kind, _REMEDY)
    except FileNotFoundError:
        return None
