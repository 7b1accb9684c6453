"""Questions that name an image of a conversation by its place, such as "what was in the first image?"."""

ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
)


def ordinal_question(step: int) -> str:
    """The question about image `step` (from 0): a conversation writes the image under it, so that it can be asked for.

    Raises IndexError beyond the last ordinal.
    """
    return f"what was in the {ORDINALS[step]} image?"


def is_ordinal_question(question: str) -> bool:
    """Whether a question asks for an image by its place: such a question is about the memory, not the image in view."""
    words = question.strip().lower()
    return any(words == ordinal_question(step) for step in range(len(ORDINALS)))
