"""The prompt of an assembled model: its decoder's own chat template, rendered once for a question about an image.

A decoder without a chat template gets PLAIN_TEMPLATE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from microvlm.config import PromptConfig
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.model.pretrained.chat_template import TemplateError, render

PROMPT = "{prompt}"
PLAIN_TEMPLATE = "User: {image}{prompt}\nAssistant:"
"""For a decoder without a chat template; a token that begins every text of it comes first."""
CAPTION_PROMPT = "Describe this image."
IMAGE_TOKENS = ("<|image_pad|>", "<image>")
"""Image tokens that a tokenizer may have; the last one is added where it has neither."""
_ANSWER = "{answer}"


def find_image_token(added_tokens: Mapping[str, int]) -> str:
    """The tokenizer's own image token, or the one to add."""
    return next((token for token in IMAGE_TOKENS if token in added_tokens), IMAGE_TOKENS[-1])


def derive_prompt(
    tokenizer_config: Mapping[str, Any],
    added_tokens: Mapping[str, int],
    end_tokens: list[str],
    template: str | None = None,
) -> PromptConfig:
    """The prompt of a decoder.

    `added_tokens`: those of its tokenizer, by text. `end_tokens`: the tokens that end a text by its configuration, the
    most particular first. `template` is used in place of the chat template; it has the image token and `{prompt}` once.

    Raises UserError for a chat template that cannot be used, and for a decoder whose texts have no end.
    """
    image = find_image_token(added_tokens)
    chat = tokenizer_config.get("chat_template")
    turn_end = None
    if template is None and isinstance(chat, str):
        template, turn_end = _render_chat(chat, image, tokenizer_config, added_tokens)
    elif template is None:
        begin = _token(tokenizer_config, "bos_token") if tokenizer_config.get("add_bos_token") else None
        template = (begin or "") + PLAIN_TEMPLATE.replace("{image}", image)
    template = template if image in template else _with_image(template, image)
    ends = [token for token in (turn_end, *end_tokens) if token in added_tokens]
    if not ends:
        raise UserError(
            "the decoder's files name no token that ends a text (eos_token_id in generation_config.json or "
            "eos_token in tokenizer_config.json): add it."
        )
    pad = _token(tokenizer_config, "pad_token")
    return PromptConfig(
        template=template,
        image_token=image,
        eos_token=str(ends[0]),
        pad_token=pad if pad in added_tokens and pad is not None else str(ends[-1]),
        caption_prompt=CAPTION_PROMPT,
    )


def check_template(template: str) -> None:
    """Raise UserError for a --prompt-template that no image and question fit into."""
    if template.count(PROMPT) != 1:
        raise UserError(
            f"--prompt-template {quote(template)} must have {PROMPT} once, where the question goes."
        )


def _with_image(template: str, image: str) -> str:
    """`template` with the image right before the question, or where another image token stands."""
    for token in IMAGE_TOKENS:
        if token in template:
            return template.replace(token, image)
    return template.replace(PROMPT, image + PROMPT)


def _render_chat(
    chat: str, image: str, tokenizer_config: Mapping[str, Any], added_tokens: Mapping[str, int]
) -> tuple[str, str | None]:
    """(the text before an answer, the token that ends an answer). Raises UserError."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: _token(tokenizer_config, name) or "" for name in names}
    question = {"role": "user", "content": image + PROMPT}
    try:
        before = render(
            chat, {"messages": [question], "add_generation_prompt": True, "tools": None, **tokens}
        )
    except TemplateError as error:
        raise UserError(
            f"the decoder's chat template cannot be rendered ({error}): give one with --prompt-template."
        ) from None
    if before.count(image) != 1 or before.count(PROMPT) != 1:
        raise UserError(
            "the decoder's chat template does not show a question once, as it was asked: give one with "
            "--prompt-template."
        )
    messages = [question, {"role": "assistant", "content": _ANSWER}]
    try:
        whole = render(chat, {"messages": messages, "add_generation_prompt": False, "tools": None, **tokens})
    except TemplateError:
        return before, None
    after = whole.partition(_ANSWER)[2]
    places = [(after.find(token), -len(token), token) for token in added_tokens if token and token in after]
    return before, min(places)[2] if places else None


def _token(tokenizer_config: Mapping[str, Any], name: str) -> str | None:
    """A token of tokenizer_config.json: text, or an object with its text."""
    value = tokenizer_config.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None
