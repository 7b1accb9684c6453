"""How images of a conversation are named by their place: the text that keys one in the memory and asks for it."""

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
    """The question about image `step` (from 0). Written under it, an image is found again by asking it."""
    return f"what was in the {ORDINALS[step]} image?"
