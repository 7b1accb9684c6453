"""Attention guidance: its loss is -log of the attention that the decoder pays, and minimising it moves attention."""

import numpy as np
import pytest
import torch
from conftest import FLOAT, seeded_model, tiny_config

from microvlm.config import MicroVLMConfig
from microvlm.inputs.processor import Processor
from microvlm.model.checkpoint import resolve_checkpoint
from microvlm.model.microvlm import MicroVLM, positions_of
from microvlm.training.emoji.data.scenes import read_scene_objects
from microvlm.training.emoji.losses.attention_guidance import (
    ANSWER_LAYER,
    GUIDED_HEAD,
    WORD_LAYER,
    AttentionTap,
    Lookups,
)
from microvlm.training.emoji.losses.picture_losses import name_tokens


@pytest.fixture
def model() -> MicroVLM:
    config = tiny_config(FLOAT).to_dict()
    config["text"]["num_hidden_layers"] = 3
    return seeded_model(MicroVLMConfig.from_dict(config)).train()


def forward(model: MicroVLM) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    embeds, mask = torch.randn(3, 7, model.config.text.hidden_size), torch.ones(3, 7, dtype=torch.long)
    mask[2, 5:] = 0
    model(embeds, mask)
    return embeds, mask


LOOKUPS = Lookups.build([(0, 6, np.array([1, 2])), (2, 4, np.array([0]))], width=7)


@pytest.mark.parametrize("layer", [WORD_LAYER, ANSWER_LAYER])
def test_the_loss_is_minus_log_of_the_attention_that_reaches_the_targets(model, layer):
    with AttentionTap(model.decoder) as tap:
        embeds, mask = forward(model)
        loss = tap.loss(layer, LOOKUPS)
    slot = torch.cat([torch.zeros(3, 1, dtype=torch.long), mask], 1)
    maps = model.decoder.attention_maps(embeds, slot, positions_of(mask), model.empty_slot(3))[layer]
    # Column 0 is the memory slot's.
    first = maps[0, GUIDED_HEAD, 6, [2, 3]].sum()
    second = maps[2, GUIDED_HEAD, 4, 1]
    torch.testing.assert_close(loss, -(first.log() + second.log()) / 2)


def test_minimising_the_loss_moves_the_attention_and_leaves_no_hook(model):
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        with AttentionTap(model.decoder) as tap:
            forward(model)
        loss = tap.loss(WORD_LAYER, LOOKUPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_token_that_names_an_object_is_in_every_question_about_it():
    processor = Processor.from_pretrained(resolve_checkpoint("nano"))
    for token, (_, caption) in zip(name_tokens(processor), read_scene_objects(), strict=True):
        assert token in processor.prompt_ids(f"where is the {caption}?", 1)


def test_lookups_keep_row_query_and_targets_together():
    assert len(LOOKUPS) == 2
    assert LOOKUPS.rows.tolist() == [0, 2]
    assert LOOKUPS.queries.tolist() == [6, 4]
    assert [row.nonzero().flatten().tolist() for row in LOOKUPS.targets] == [[1, 2], [0]]
    assert len(Lookups.build([], width=7)) == 0
