"""Starting from a checkpoint: latent weights that round to its trits; and the optimiser for CPUs without bfloat16."""

import signal
import subprocess
import sys

import pytest
import torch
from conftest import files_below

from microvlm.errors import UserError
from microvlm.model.linear import ternarize
from microvlm.presets import preset
from microvlm.training import run_checks
from microvlm.training.loop.muon import Float32Muon, orthogonalise
from microvlm.training.loop.optimizers import usable_precision
from microvlm.training.tokenizer_training import save_tokenizer, train_tokenizer
from microvlm.training.warm_start import draw_latents, float_weights


@pytest.mark.parametrize("zeros", [0.02, 0.31, 0.9])
def test_latents_round_to_the_trits_and_the_scale_that_were_stored(zeros):
    generator = torch.Generator().manual_seed(0)
    nonzero = torch.rand(96, 160, generator=generator) >= zeros
    trits = nonzero * (torch.randint(0, 2, nonzero.shape, generator=generator) * 2 - 1)
    latents = draw_latents(0.037 * trits, torch.Generator().manual_seed(1))
    rounded, scale = ternarize(latents)
    assert torch.equal(rounded, trits.float())
    assert scale.item() == pytest.approx(0.037, rel=1e-5)
    # A latent is not a copy of its trit: magnitudes differ, on both sides of the threshold.
    assert latents[nonzero].abs().unique().numel() > 0.9 * nonzero.sum()
    assert (latents[~nonzero] != 0).all()


def test_a_weight_that_is_no_trit_matrix_stays_as_it_is():
    weight = torch.randn(8, 8)
    assert draw_latents(weight, torch.Generator()) is weight
    assert draw_latents(torch.zeros(4, 4), torch.Generator()).eq(0).all()


def test_latents_of_the_bundled_checkpoint_are_the_bundled_model():
    weight = float_weights("nano")["decoder.layers.0.mlp.gate_proj.weight"]
    trits, scale = ternarize(draw_latents(weight, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(trits * scale, weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_float32_muon_takes_the_steps_of_torch_muon(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    options = {"lr": 0.02, "weight_decay": 0.05}
    optimizers = [
        Float32Muon([ours], **options),
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options),
    ]
    start = ours.detach().clone()
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.02 * moved


def test_muon_updates_matrices_of_one_shape_together_as_each_alone():
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 48), (48, 16)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(weight.detach().clone()) for weight in together]
    optimizers = [Float32Muon(together), *(Float32Muon([weight]) for weight in alone)]
    for _ in range(2):
        for weight, copy in zip(together, alone, strict=True):
            weight.grad = torch.randn(weight.shape)
            copy.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for weight, copy in zip(together, alone, strict=True):
        torch.testing.assert_close(weight, copy, rtol=1e-5, atol=1e-7)


def test_orthogonalising_keeps_the_singular_vectors_and_evens_the_values():
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ orthogonalise(matrix) @ v.T
    assert turned.diagonal().min() > 0.6
    assert turned.diagonal().max() < 1.3
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-4


def test_bf16_is_used_only_where_the_machine_computes_in_it(monkeypatch):
    lines = []
    for supported, used in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr("microvlm.training.loop.optimizers.has_bfloat16", lambda value=supported: value)
        assert usable_precision("bf16", lines.append) == used
        assert usable_precision("no", lines.append) == "no"
    assert lines == ["this CPU has no bfloat16 arithmetic: training in float32"]


_KILLED_CLAIM = """
import os, signal, sys
from pathlib import Path
from microvlm.presets import preset
from microvlm.training import run_checks
os.replace = lambda old, new: os.kill(os.getpid(), signal.SIGKILL)
run_checks.claim_folder(Path(sys.argv[1]), "caption", {"recipe": {}})
"""


@pytest.mark.posix
def test_a_start_that_was_killed_while_it_wrote_its_recipe_can_be_repeated(tmp_path):
    process = subprocess.run([sys.executable, "-P", "-c", _KILLED_CLAIM, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == [".recipe.json.new"]
    run_checks.claim_folder(tmp_path, "caption", {"recipe": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
    (tmp_path / "recipe.json").rename(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="not a training folder"):
        run_checks.claim_folder(tmp_path, "caption", {"recipe": {}})


@pytest.mark.posix
def test_a_tokenizer_that_cannot_be_written_whole_stays_as_it_was(tmp_path):
    tokenizer = train_tokenizer(["a red heart"], 300)
    save_tokenizer(tokenizer, preset("nano"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert (tmp_path / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    with files_below(1000), pytest.raises(UserError, match=r"tokenizer\.json cannot be written"):
        save_tokenizer(tokenizer, preset("nano"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
