"""Copy a checkpoint's model card into a bundle, as a page that stands alone. Knows nothing of what a card says."""

from __future__ import annotations

import re
from pathlib import Path

from microvlm.errors import UserError
from microvlm.formats import documents

MODEL_CARD = "MODEL_CARD.md"
MAX_CARD_BYTES = 1_000_000
_TARGET = r"\((?![a-z]+:|#)[^()\s]*\)"
"""Of a link: a path of the checkpoint's surroundings. A bundle has no such file."""
_COMMENT = re.compile(r"(?m)^<!--.*-->\n")
# Words without brackets, so that a page of nothing but brackets takes no time.
_PICTURE = re.compile(rf"(?m)^!\[[^][]*\]{_TARGET}\n{{0,2}}|!\[[^][]*\]{_TARGET}")
_LINK = re.compile(rf"\[([^][]*)\]{_TARGET}")


def copy_card(source: Path, folder: Path) -> None:
    """Write FOLDER/MODEL_CARD.md of the checkpoint `source`; without a card, nothing.

    Raises UserError for one that is no text, or larger than a page.
    """
    path = source / MODEL_CARD
    try:
        text = documents.read_file(path, MAX_CARD_BYTES).decode()
    except FileNotFoundError:
        return
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: save it again, or remove it.") from None
    (folder / MODEL_CARD).write_text(stand_alone(text), encoding="utf-8")


def stand_alone(text: str) -> str:
    """A page without comments, pictures and links of other files. The words of a link stay, and so do web addresses."""
    return _LINK.sub(r"\1", _PICTURE.sub("", _COMMENT.sub("", text)))
