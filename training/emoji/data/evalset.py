"""Builds the evaluation set of the repository: images, scenes and episodes with the test vendor's drawings.

Hashes and one seed fix it before any training, which does not use these drawings.
The reader is `microvlm.bench.evalset_reader`, which needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from microvlm.atomic_folder import new_folder
from microvlm.training.emoji.data.drawing_sources import TEST_VENDOR, DataError
from microvlm.training.emoji.data.emoji import EmojiData, read_test_emoji
from microvlm.training.emoji.data.episode_texts import Episode, sample_episode
from microvlm.training.emoji.data.scene_drawing import compose_scenes
from microvlm.training.emoji.data.scenes import GROUNDS, SIDES, Question, Scene, sample_scene
from microvlm.training.emoji.data.views import plain_emoji, to_uint8

SEED = 20
IMAGES = 210
RELATION_SCENES = 40
COUNTING_SCENES = 32
TWO_IMAGE_EPISODES = 12
LONGER_EPISODES = (4, 4, 4, 4, 8, 8, 8, 8)
LONGEST_EPISODE = 20

PROVENANCE = """\
# Evaluation set

Drawings: EmojiOne 2.x, continued as EmojiTwo (https://github.com/EmojiTwo/emojitwo),
copyright Ranks.com Inc. and the EmojiTwo contributors, taken from the npm package
@iconify-json/emojione {version}.
Licence: Creative Commons Attribution 4.0 International (CC BY 4.0),
https://creativecommons.org/licenses/by/4.0/

Changes made: the vector drawings were rasterised and scaled onto a white ground of 96 x 96 pixels
(`images/`), or scaled and placed, one to four together, on a coloured ground (`scenes/`).
Captions are the English labels of emojibase-data (MIT), in lower case ASCII.

No drawing of this set is used in training. The files are under the licence above, not under the
project's own. Written by `microvlm-data evalset`.
"""


def choose_images(count: int = IMAGES) -> list[tuple[str, str]]:
    """The `count` test emoji with the smallest sha256 of their hexcode: (hexcode, caption)."""
    return sorted(read_test_emoji(), key=lambda row: hashlib.sha256(row[0].encode()).hexdigest())[:count]


def plan_scenes(seed: int = SEED) -> tuple[list[Scene], list[Scene]]:
    """Scenes with a relation, and scenes to count objects in; training composes none of their pairs.

    Grounds and counts take turns, so that no answer is frequent by chance.
    """
    rng = np.random.default_rng(seed)
    relations: list[Scene] = []
    composed = set()
    while len(relations) < RELATION_SCENES:
        scene = sample_scene(rng, True, True, len(relations) % len(GROUNDS))
        pair = frozenset(o.object for o in scene.objects)
        relation = list(SIDES)[len(relations) * 2 // RELATION_SCENES]
        if scene.relation == relation and pair not in composed:
            composed.add(pair)
            relations.append(scene)
    counting: list[Scene] = []
    while len(counting) < COUNTING_SCENES:
        scene = sample_scene(rng, True, False, len(counting) // 4 % len(GROUNDS))
        if len(scene.objects) == len(counting) % 4 + 1:
            counting.append(scene)
    return relations, counting


def plan_episodes(captions: list[str], seed: int = SEED) -> list[Episode]:
    """Episodes over the chosen images, by row: of two images, of four or eight, and one of twenty."""
    rng = np.random.default_rng(seed + 1)
    lengths = [2] * TWO_IMAGE_EPISODES + [*LONGER_EPISODES, LONGEST_EPISODE]
    return [sample_episode(rng, range(len(captions)), captions, length) for length in lengths]


def _record(file: str, scene: Scene, question: Question, twin: str | None) -> dict:
    return {
        "file": file,
        "kind": question.kind,
        "question": question.text,
        "answer": question.answer,
        "twin": twin,
        "objects": [o.caption for o in scene.objects],
        "ground": GROUNDS[scene.ground][0],
    }


def _scene_records(files: list[str], scenes: list[Scene], twins: list[str | None]) -> list[dict]:
    """Questions about sides for scenes with a relation, about the number for the others, about the colour for all."""
    records = []
    for file, scene, twin in zip(files, scenes, twins, strict=True):
        if scene.relation:
            # Only the direct forms: the same words must have an answer in the twin.
            questions = scene.questions("what")[:2] + scene.questions("where")
            records += [_record(file, scene, q, twin) for q in questions]
        else:
            records += [_record(file, scene, q, None) for q in scene.questions("how many")]
        records += [_record(file, scene, q, None) for q in scene.questions("which colour")]
    return records


def _episode_records(episodes: list[Episode], files: list[str]) -> list[dict]:
    """Each episode, followed by its twin in another order."""
    records: list[dict] = []
    for i, episode in enumerate(episodes):
        for version, twin in ((episode, 2 * i + 1), (episode.swapped(), 2 * i)):
            questions = [
                {"question": q.text, "answer": q.answer, "step": q.step, "distance": q.distance}
                for q in version.questions()
            ]
            records.append(
                {"files": [files[r] for r in version.images], "questions": questions, "twin": twin}
            )
    return records


def save_images(folder: Path, files: list[str], images: torch.Tensor) -> None:
    """Save float32 [B, 3, S, S] in 0..1 as PNG files in `folder`."""
    for file, array in zip(files, to_uint8(images), strict=True):
        (folder / file).parent.mkdir(exist_ok=True)
        Image.fromarray(array).save(folder / file, "PNG", optimize=True)


def build_evalset(emoji: EmojiData, out: Path, version: str) -> dict:
    """Write the set to `out`, which must not exist; returns counts and bytes.

    version : version of the drawings' package, for the provenance text.
    """
    if out.exists():
        raise DataError(f"{out} exists: choose another --output.")
    chosen = choose_images()
    rows = [emoji.index(code) for code, _ in chosen]
    image_files = [f"images/{code.lower()}.png" for code, _ in chosen]
    relations, counting = plan_scenes()
    first = [f"scenes/r{i:02d}a.png" for i in range(len(relations))]
    second = [f"scenes/r{i:02d}b.png" for i in range(len(relations))]
    scenes = relations + [s.swapped() for s in relations] + counting
    scene_files = first + second + [f"scenes/n{i:02d}.png" for i in range(len(counting))]
    twins: list[str | None] = [*second, *first, *([None] * len(counting))]
    document = {
        "images": [
            {"file": file, "caption": caption, "hexcode": code, "group": emoji.groups[row]}
            for file, (code, caption), row in zip(image_files, chosen, rows, strict=True)
        ],
        "scenes": _scene_records(scene_files, scenes, twins),
        "episodes": _episode_records(plan_episodes([c for _, c in chosen]), image_files),
    }
    with new_folder(out) as temporary:
        drawings = torch.from_numpy(np.array(emoji.images(TEST_VENDOR)[rows]))
        save_images(temporary, image_files, plain_emoji(drawings))
        save_images(temporary, scene_files, compose_scenes(scenes, emoji, [TEST_VENDOR] * len(scenes)))
        (temporary / "README.md").write_text(PROVENANCE.format(version=version), encoding="utf-8")
        # One record a line: small, and a change shows as one line.
        body = ",\n".join(
            f'"{key}": [\n' + ",\n".join(json.dumps(r) for r in records) + "\n]"
            for key, records in document.items()
        )
        (temporary / "evalset.json").write_text("{\n" + body + "\n}\n", encoding="utf-8")
    total = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return {"output": str(out), **{key: len(records) for key, records in document.items()}, "bytes": total}
