"""What people put around a question: "please", "can you tell me". Half of the wrappings are held out with the wordings.

A wrapping belongs to a clause of `grammar_notation` (q, i, m, n, s) and has `{}` where the form goes.
"""

from __future__ import annotations

PLAIN = {"q": ("{}?", "{}"), "i": ("tell me {}",), "m": ("{}",), "n": ("what is {}?", "{}?"), "s": ("{}",)}
"""Wrappings of both splits; they say as little as can be."""

WRAPPINGS = {
    "train": {
        "q": (
            "please, {}?",
            "{}, please?",
            "hey, {}?",
            "so {}?",
            "tell me, {}?",
            "look, {}?",
            "a question: {}?",
            "now, {}?",
            "i ask you: {}?",
            "do you know: {}?",
            "look at the picture: {}?",
            "and {}?",
        ),
        "i": (
            "can you tell me {}?",
            "please tell me {}",
            "do you know {}?",
            "i want to know {}",
            "could you say {}?",
            "i would like to know {}",
            "can you see {}?",
            "would you please say {}",
            "let me know {}",
            "my question is {}",
        ),
        "m": (
            "please {}",
            "can you {}?",
            "{} for me",
            "i want you to {}",
            "would you {}?",
            "could you please {}?",
            "now {}",
            "i would like you to {}",
        ),
        "n": (
            "tell me {}",
            "please tell me {}",
            "can you tell me {}?",
            "i want to know {}",
            "do you know {}?",
            "{}, please",
            "could you say {}?",
        ),
        "s": ("hey, {}", "please, {}", "so {}"),
    },
    "held_out": {
        "q": (
            "so please, {}?",
            "can you tell me: {}?",
            "{}, do you know?",
            "my question is: {}?",
            "hey, look: {}?",
            "{}, tell me please",
            "please say: {}?",
            "well, {}?",
            "{}, can you tell me?",
            "i have a question: {}?",
            "ok, {}?",
            "{} now?",
        ),
        "i": (
            "could you tell me {}?",
            "please say {}",
            "can you say {}?",
            "i would like you to tell me {}",
            "do you see {}?",
            "would you tell me {}?",
            "tell me please {}",
            "please let me know {}",
            "now say {}",
            "could you please tell me {}?",
        ),
        "m": (
            "could you {}?",
            "{}, please",
            "would you please {}?",
            "can you please {}?",
            "{} now",
            "i want to ask you to {}",
            "so {}",
        ),
        "n": (
            "please say {}",
            "could you tell me {}?",
            "i would like to know {}",
            "say {}",
            "can you say {}?",
            "let me know {}",
            "{}, do you know it?",
        ),
        "s": ("so please, {}", "now, {}", "{}, please"),
    },
}

SIDES_AT: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "left": ("on the left", "on the left side", "at the left", "on the left hand side"),
        "right": ("on the right", "on the right side", "at the right", "on the right hand side"),
        "top": ("at the top", "in the upper part", "at the upper side", "at the upper edge", "above"),
        "bottom": ("at the bottom", "in the lower part", "at the lower side", "at the lower edge", "below"),
        "middle": ("in the middle", "in the centre", "at the centre"),
    },
    "held_out": {
        "left": (
            "on the left",
            "to the left",
            "at the left side",
            "at the left edge",
            "at the left hand side",
        ),
        "right": (
            "on the right",
            "to the right",
            "at the right side",
            "at the right edge",
            "at the right hand side",
        ),
        "top": ("at the top", "on the upper side", "on the upper edge", "in the top part"),
        "bottom": ("at the bottom", "on the lower side", "on the lower edge", "in the bottom part"),
        "middle": ("in the middle", "at the middle", "in the middle part", "in the centre"),
    },
}
"""Places in a picture, said after "is"."""

SIDES_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "left": ("left of", "to the left of", "on the left side of", "further left than"),
        "right": ("right of", "to the right of", "on the right side of", "further right than"),
        "above": ("above", "over", "higher up than", "further up than", "up over"),
        "below": ("below", "under", "underneath", "beneath", "lower down than"),
    },
    "held_out": {
        "left": ("left of", "on the left of", "to the left side of", "further to the left than"),
        "right": ("right of", "on the right of", "to the right side of", "further to the right than"),
        "above": ("above", "over", "higher than", "up above"),
        "below": ("below", "under", "lower than", "down below"),
    },
}
"""Places beside another thing, said before its name."""
