"""Loads a checkpoint's weights into a stage's model, as the float values that the stored model computes with.

A checkpoint has no latent weights. A ternary stage gets random ones that round to the stored trits, with magnitudes
from a nearly normal distribution, as training produces. The stage then starts from the stored model, and every trit can
change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from safetensors import safe_open
from torch import Tensor, nn

from microvlm.config import MicroVLMConfig
from microvlm.errors import UserError
from microvlm.model import torch_ops
from microvlm.model.checkpoint import WEIGHTS, load_checkpoint, resolve_checkpoint
from microvlm.model.linear import TernaryLinear
from microvlm.model.microvlm import MicroVLM
from microvlm.model.pretrained.float_weights import float_weights

LATENT_SEED = 0
LAYERS = "decoder.layers"
NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norms of the residual stream in a layer -> the linears that read them."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""Linears whose outputs are added to the residual stream."""
PROBE = (4, 64)
"""Rows and tokens that the sizes of activations are taken from."""
MARGIN = 1e-3
"""Distance that a latent weight keeps from the rounding threshold, in units of g, so that float errors move no trit."""


def weights_sha256(source: str) -> str:
    """Hash of a checkpoint's weights file, by which a run records what it started from."""
    with (resolve_checkpoint(source) / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_dtypes(source: str) -> dict[str, torch.dtype]:
    """The precision that a checkpoint stores each tensor at, by name."""
    with safe_open(str(resolve_checkpoint(source) / WEIGHTS), framework="pt") as file:
        names = list(file.keys())
        # A number alone has no rows to leave out.
        scalars = {name for name in names if not file.get_slice(name).get_shape()}
        return {
            name: (file.get_tensor(name) if name in scalars else file.get_slice(name)[:0]).dtype
            for name in names
        }


def start_from(model: MicroVLM, source: str, fresh: Sequence[str] = ()) -> list[str]:
    """Load a checkpoint's float weights; returns the parameters that keep their initial values.

    fresh : parts of the model (first words of parameter names) that are not taken from the checkpoint.
    Raises UserError when the checkpoint has a weight that the model lacks, or one of another shape.
    """
    expected = model.state_dict()
    unknown = [part for part in fresh if not any(name.split(".")[0] == part for name in expected)]
    if unknown:
        raise UserError(f"the model has no part '{unknown[0]}' that could begin anew.")
    tensors = {name: t for name, t in float_weights(source).items() if name.split(".")[0] not in fresh}
    _load(model, tensors, source)
    return sorted(set(expected) - set(tensors))


def take_decoder(model: MicroVLM, source: str) -> set[str]:
    """Load the decoder of another checkpoint in place of the start's, but not its embeddings; returns its names.

    Raises UserError when it does not fit the model.
    """
    tensors = {name: t for name, t in float_weights(source).items() if name.startswith("decoder.")}
    _load(model, tensors, source)
    return set(tensors)


def _load(model: MicroVLM, tensors: dict[str, Tensor], source: str) -> None:
    """Load some of a model's parameters, ternary ones as latent weights."""
    expected = model.state_dict()
    for name, tensor in tensors.items():
        if name not in expected or expected[name].shape != tensor.shape:
            raise UserError(f"'{source}' is another model's checkpoint: its '{name}' does not fit.")
    _rotate_stream(model, tensors, source)
    model.load_state_dict(tensors, strict=False)
    generator = torch.Generator().manual_seed(LATENT_SEED)
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear) and f"{name}.weight" in tensors:
            with torch.no_grad():
                module.weight.copy_(draw_latents(tensors[f"{name}.weight"], generator))


def _rotate_stream(model: MicroVLM, tensors: dict[str, Tensor], source: str) -> None:
    """Rotate a float decoder's weights for a model whose residual stream is rotated, so that it computes the same.

    A norm and a rotation change places where the norm has no gains: these go into the weights that read it.
    """
    stored = MicroVLMConfig.load(resolve_checkpoint(source))
    rotation = model.config.text.rotation
    if rotation == stored.text.rotation or not any(name.startswith(f"{LAYERS}.") for name in tensors):
        return
    if stored.quantization.is_ternary or stored.text.rotation:
        raise UserError(
            f"the decoder of '{source}' has a rotation of {stored.text.rotation}, which a stage with one of {rotation} "
            "cannot change: give the float model that it was made from, or change the recipe's `rotation`."
        )
    layers = [f"{LAYERS}.{index}" for index in range(model.config.text.num_hidden_layers)]
    parts = [*NORMS, *(name for readers in NORMS.values() for name in readers), *WRITERS]
    if any(f"{layer}.{part}.weight" not in tensors for layer in layers for part in parts):
        return  # no whole decoder: the caller says so
    for layer in layers:
        for norm, readers in NORMS.items():
            gains = tensors[f"{layer}.{norm}.weight"]
            for reader in readers:
                name = f"{layer}.{reader}.weight"
                tensors[name] = torch_ops.rotate_blocks(tensors[name] * gains, rotation)
            tensors[f"{layer}.{norm}.weight"] = torch.ones_like(gains)
        for writer in WRITERS:
            name = f"{layer}.{writer}.weight"
            tensors[name] = torch_ops.rotate_blocks(tensors[name].T, rotation).T.contiguous()


def begin_sub_norms(model: MicroVLM, source: str) -> None:
    """Give new norms of SubLN the mean size of what they normalise, which `source`, a float checkpoint, computes.

    Their gains of one would make a layer's output many times larger or smaller than the one that the rest of the model
    was trained with. Sizes are of rows of random tokens: a start has no text of its own.
    """
    start = load_checkpoint(source)
    generator = torch.Generator().manual_seed(LATENT_SEED)
    ids = torch.randint(start.config.text.vocab_size, PROBE, generator=generator)
    sizes: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sizes[name] = inputs[0].float().square().mean(-1).sqrt().mean()

        return hook

    norms = {name: norm for name, norm in model.decoder.named_modules() if name.endswith("sub_norm")}
    for name in norms:
        start.decoder.get_submodule(name).register_forward_pre_hook(record(name))
    with torch.no_grad():
        start.hidden_states(start.embed(ids), torch.ones_like(ids))
        for name, norm in norms.items():
            norm.weight.fill_(float(sizes[name]))


def draw_latents(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Latent weights that `ternarize` turns back into the trits and (up to rounding) the scale g of g * trits [N, K].

    Magnitudes are those of a normal variable with mean magnitude g, on the same side of the threshold g / 2 as their
    trit. Magnitudes above it are stretched so that the mean is g for any share of zeros. A weight that is not a
    multiple of trits, or only zeros, is returned unchanged.
    """
    g = float(weight.abs().max())
    trits = torch.round(weight / g) if g > 0 else weight
    if g == 0 or not torch.allclose(trits * g, weight, rtol=1e-5, atol=0.0):
        return weight
    # Quantiles of a half-normal variable, uniform below or above the threshold's.
    sigma = (torch.pi / 2) ** 0.5
    border = torch.special.erf(torch.tensor(0.5 / sigma / 2**0.5)).item()
    uniform = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    is_nonzero = trits != 0
    place = torch.where(is_nonzero, border + (1 - border) * uniform, border * uniform)
    magnitude = sigma * 2**0.5 * torch.special.erfinv(place.clamp(max=1 - 1e-6))
    above = (magnitude[is_nonzero] - 0.5).clamp(min=MARGIN)
    below = magnitude[~is_nonzero].clamp(max=0.5 - MARGIN)
    stretch = (weight.numel() - below.sum() - 0.5 * above.numel()) / above.sum()
    signs = torch.where(torch.rand(below.shape, generator=generator) < 0.5, -1.0, 1.0)
    latent = torch.empty_like(magnitude)
    latent[is_nonzero] = trits[is_nonzero] * (0.5 + stretch * above)
    latent[~is_nonzero] = signs * below
    return (g * latent).float()
