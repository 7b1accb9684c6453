"""The photographs of the benchmark: each with its author and licence, and chosen for models that see photographs."""

import dataclasses

from PIL import Image

from microvlm.bench.equivalence.samples import choose
from microvlm.bench.evalset_reader import load_evalset
from microvlm.bench.photograph_reader import read_photographs
from microvlm.presets import preset


def test_every_photograph_is_there_with_its_terms():
    photographs = read_photographs()
    folder = photographs[0].path.parent
    assert {photo.path for photo in photographs} == set(folder.glob("*.jpg"))
    for photo in photographs:
        assert photo.licence in ("CC0-1.0", "public domain")
        assert photo.author
        assert photo.source
        with Image.open(photo.path) as image:
            assert max(image.size) <= 360


def test_half_of_the_compared_and_all_timed_images_are_photographs_for_models_that_see_them():
    evalset, photographs = load_evalset(), {photo.path for photo in read_photographs()}
    chosen = choose(evalset, preset("photo"), 8, 3)
    assert [sample.images[0] in photographs for sample in chosen] == [True] * 4 + [False] * 7
    for share in (0.5, 1.0):
        assert not {sample.images[0] for sample in choose(evalset, preset("nano"), 8, 3, share)} & photographs
    timed = choose(evalset, preset("photo"), 8, 0, photograph_share=1.0)
    assert {sample.images[0] for sample in timed} < photographs
    assert len(timed) == 8
    other = dataclasses.replace(preset("photo").prompt, caption_prompt="what is it?")
    (sample,) = choose(evalset, dataclasses.replace(preset("photo"), prompt=other), 1, 0)
    assert (sample.prompt, sample.kind) == ("what is it?", "caption")
