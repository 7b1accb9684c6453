"""Drawings without captions: which icons a build keeps, how they are opened, and facts about them."""

import numpy as np
import pytest
import torch

pytest.importorskip("resvg_py")

from drawn_emoji import run, write_json

from microvlm.errors import UserError
from microvlm.inputs.processor import Processor
from microvlm.presets import preset
from microvlm.training.batches.sample_texts import TextRows
from microvlm.training.emoji.batches.drawing_sampler import DrawingSampler
from microvlm.training.emoji.batches.fact_batches import FactSampler
from microvlm.training.emoji.data.drawings import DRAWING_SOURCES, Drawings, build_drawings, load_drawings
from microvlm.training.emoji.data.emoji import load_emoji
from microvlm.training.emoji.data.fact_texts import sample_facts
from microvlm.training.emoji.stages.scope import ScopeTask
from microvlm.training.emoji.stages.vlm import VLMTask
from microvlm.training.emoji.tokenizer_corpus import tokenizer_corpus
from microvlm.training.recipe import StageConfig, load_recipe
from microvlm.training.stages.task import StageInputs
from microvlm.training.tokenizer_training import train_tokenizer

KEPT = {"apple": "red", "bell": "blue", "cart": "green"}
LEFT_OUT = ("apple-flat", "bell-24", "folder-bell", "cart-open", "file-type-light-cart")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of drawings, its build's summary and its packages: three icons a set, variants, a copy, an empty one."""
    root = tmp_path_factory.mktemp("drawings") / "node_modules"
    for number, source in enumerate(DRAWING_SOURCES):
        square = '<rect x="2" y="{}" width="20" height="16" fill="{}"/>'
        icons = {n: {"body": square.format(number % 6, c)} for n, c in KEPT.items()}
        icons |= {name: {"body": square.format(0, "black")} for name in LEFT_OUT}
        icons |= {"twin-of-cart": icons["cart"], "void": {"body": '<rect width="1" height="1"/>'}}
        write_json(root / source.package / "icons.json", {"icons": icons, "width": 24, "height": 24})
    out = tmp_path_factory.mktemp("out")
    return out, build_drawings(root, out, lambda *_: None), root


def test_one_of_the_variants_of_an_icon_is_kept_and_neither_copies_nor_empty_ones(drawn):
    out, summary, _ = drawn
    drawings = load_drawings(out)
    first = DRAWING_SOURCES[0].vendor
    assert drawings.names[:3] == [f"{first}/{name}" for name in KEPT]
    assert drawings.pixels.shape == (len(drawings.names), 96, 96, 4)
    # The seventh set draws as the first does.
    assert len(drawings.names) == 18 == summary["drawings"]
    assert summary["sets"][first] == 3
    assert summary["sets"][DRAWING_SOURCES[6].vendor] == 0
    assert not np.array_equal(drawings.pixels[0], drawings.pixels[1])
    # Every set has the same three names here, so that what is kept back is known by another set's drawing.
    assert drawings.trained.any()
    assert not (drawings.trained & drawings.reserved).any()


def test_no_reserved_drawing_shows_a_trained_thing():
    names = [
        f"{where}/thing{number}{end}" for number in range(200) for where, end in (("a", ""), ("b", "-2"))
    ]
    drawings = Drawings(names, np.zeros((len(names), 1, 1, 4), np.uint8))
    stems = np.repeat(np.arange(200), 2)
    assert set(stems[drawings.trained]) & set(stems[drawings.reserved]) == set()
    assert 0 < drawings.reserved.sum() < (~drawings.trained).sum()


def test_a_failed_build_names_the_reason_and_leaves_nothing(drawn, tmp_path):
    out, _, root = drawn
    again = run("drawings", "-o", str(out), "--packages", str(root))
    assert again.exit_code == 2
    assert "delete it to build it again" in again.stderr
    missing = run("drawings", "-o", str(tmp_path / "new"), "--packages", str(tmp_path))
    assert missing.exit_code == 2
    assert "is missing" in missing.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("broken", [None, "{", '{"format": "another", "names": ["a/b"]}'])
def test_a_folder_without_usable_drawings_is_refused(drawn, tmp_path, broken):
    if broken is not None:
        (tmp_path / "drawings").mkdir()
        (tmp_path / "drawings/drawings.json").write_text(broken)
        (tmp_path / "drawings/rgba96.npy").write_bytes((drawn[0] / "drawings/rgba96.npy").read_bytes())
    with pytest.raises(UserError, match=r"microvlm-data drawings|not valid JSON|not in the format"):
        load_drawings(tmp_path)


def test_no_question_names_an_object_without_a_caption():
    facts = sample_facts(np.random.default_rng(0), range(200), ["the only name"], pictured=True)
    wordings = [words for fact in facts for words in (fact.write_question, fact.read_question)]
    assert not any("{" in words for words in wordings)
    assert not any("the only name" in f.write_question + f.read_question for f in facts if f.object > 0)


def test_facts_about_drawings_show_them_and_all_of_an_object_show_one(drawn, drawn_build):
    emoji = load_emoji(drawn_build[0])
    pixels = load_drawings(drawn[0]).pixels
    sampler = DrawingSampler(emoji, {}, seen_share=1.0)
    fact_sampler = FactSampler(emoji, sampler, 40, 0.0, drawings=pixels, drawing_share=0.5)
    batch = fact_sampler.sample(np.random.default_rng(1), torch.Generator().manual_seed(1))
    own = np.array([fact.object for fact in batch.pictured]) >= len(emoji.captions)
    assert 5 < own.sum() < 31
    assert not any(fact.object >= len(emoji.captions) for fact in batch.text_only)
    placed = fact_sampler._pixels(
        np.array([len(emoji.captions) + 2, 0, len(emoji.captions) + 2]), torch.Generator()
    )
    assert torch.equal(placed[0], torch.from_numpy(pixels[2].copy()))
    assert torch.equal(placed[0], placed[2])
    assert not torch.equal(placed[0], placed[1])


@pytest.mark.posix
def test_the_stages_have_facts_about_different_drawings_and_scope_learns_from_its_own(
    drawn, drawn_build, tmp_path, monkeypatch
):
    folder = tmp_path / "data"
    folder.mkdir()
    for part in (*drawn_build[0].iterdir(), drawn[0] / "drawings"):
        (folder / part.name).symlink_to(part)
    emoji, drawings = load_emoji(folder), load_drawings(folder)
    # Every set has the same names here, so no drawing would be reserved: half of them are declared to be.
    trained = np.arange(len(drawings.names)) % 2 == 0
    monkeypatch.setattr(Drawings, "trained", trained)
    monkeypatch.setattr(Drawings, "reserved", ~trained)
    recipe = load_recipe("nano")
    tokenizer = train_tokenizer(tokenizer_corpus(emoji), preset("nano").text.vocab_size)

    def build(task, stage):
        config = preset("nano")
        return task(StageInputs(config, TextRows(Processor(tokenizer, config)), recipe, stage, emoji))

    scope = build(ScopeTask, StageConfig("scope", "scope", 1, 2, 0.01, drawing_share=0.5))
    facts = StageConfig(
        "facts",
        "vlm",
        1,
        20,
        0.01,
        drawing_share=0.5,
        mixture={"caption": 0.1, "episode": 0.1, "fact": 1.0},
    )
    vlm = build(VLMTask, facts)
    assert np.array_equal(scope.fact_sampler.drawings, drawings.pixels[~trained])
    assert np.array_equal(vlm.sampler.facts.drawings, drawings.pixels[trained])
    scope.prepare()
    loss, _ = scope.loss(scope.model, scope.draw(torch.Generator().manual_seed(0)))
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in scope.model.scope.parameters())


def test_the_shipped_recipe_teaches_the_scope_detector_with_drawings():
    assert load_recipe("nano").stages[-1].task == "scope"
    assert load_recipe("nano").stages[-1].drawing_share > 0
