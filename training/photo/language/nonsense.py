"""Questions of invented words, which nobody understands."""

from __future__ import annotations

from microvlm.training.photo.language.held_out import words

_ONSETS = words("""
    b bl d dr f fl g gl gr h k kl kr l m n p pl pr r s sk sl sm sn st t tr v w z
""")
_VOWELS = ["a", "e", "i", "o", "u", "oo", "ee"]
_CODAS = words("""
    b d g k l m n p r sk st t v x z ng mp lf rk
""")
_FRAMES = (
    "what is a {0}",
    "where is the {0} {1}",
    "how many {0} are {1}",
    "is the {0} {1}",
    "{0} the {1} {2}",
    "what does the {0} {1}",
    "why {0} {1}",
    "{0} {1} {2}",
    "can you {0} the {1}",
    "do you {0} {1}",
    "which {0} is more {1}",
    "tell me the {0} of {1}",
)


def nonsense_questions(count: int) -> list[str]:
    """`count` questions of invented words, made from their index alone."""
    questions = []
    for index in range(count):
        words, state = [], index + 1
        for _ in range(3):
            word = ""
            for sounds in (_ONSETS, _VOWELS, _CODAS, _VOWELS, _CODAS)[: 3 if state % 3 else 5]:
                # A linear congruential step (Numerical Recipes): the list must not depend on a library's generator.
                state = (state * 1664525 + 1013904223) % 2**32
                word += sounds[(state >> 8) % len(sounds)]
            words.append(word)
        questions.append(_FRAMES[index % len(_FRAMES)].format(*words))
    return questions
