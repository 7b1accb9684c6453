"""Objects that captions name: how many of those in the picture (recall), and how many that are not there (CHAIR).

Rohrbach et al. 2018 (arXiv 1809.02156): CHAIR_i is the share of the named objects that are not there, CHAIR_s the share
of captions with one or more of them. An object is one of COCO's categories, counted once a caption; it is there if the
annotations or any human caption of the picture names it. Every interval resamples pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from microvlm.training.scoring.held_out import Picture
from microvlm.training.scoring.object_words import categories_of, objects_in
from microvlm.training.scoring.text_measures import Measure, mean_of


def annotated(pictures: Sequence[Picture]) -> list[int]:
    """Numbers of the pictures whose objects are annotated with one or more of the categories."""
    return [number for number, picture in enumerate(pictures) if categories_of(picture.objects)]


def object_measures(answers: Sequence[str], pictures: Sequence[Picture]) -> dict[str, Measure]:
    """`object_recall`, `mentioned_recall` (of the objects that people's captions name), `chair_i` and `chair_s`."""
    named = [objects_in(answer) for answer in answers]
    mentioned = [set().union(*map(objects_in, picture.captions)) for picture in pictures]
    there = [categories_of(picture.objects) | said for picture, said in zip(pictures, mentioned, strict=True)]
    wrong = [len(ours - theirs) for ours, theirs in zip(named, there, strict=True)]
    return {
        "object_recall": _share(_common(named, there), list(map(len, there))),
        "mentioned_recall": _share(_common(named, mentioned), list(map(len, mentioned))),
        "chair_i": _share(wrong, list(map(len, named))),
        "chair_s": mean_of([count > 0 for count in wrong]),
    }


def _common(first: Sequence[set[str]], second: Sequence[set[str]]) -> list[int]:
    return [len(a & b) for a, b in zip(first, second, strict=True)]


def _share(parts: Sequence[int], wholes: Sequence[int]) -> Measure:
    """The sum of the parts over the sum of the wholes; 0 of nothing is 0: who names nothing names nothing wrong."""
    return Measure(
        np.stack([np.asarray(parts, np.float64), np.asarray(wholes, np.float64)], 1),
        lambda sums: float(sums[0] / sums[1]) if sums[1] else 0.0,
    )
