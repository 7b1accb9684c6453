"""The shape of every stored tensor of a model, from its configuration alone, to hold files against before loading them.

A file that does not fit is refused by its header, before a module is built or memory is taken. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from microvlm.config import MicroVLMConfig, TextConfig, VisionConfig
from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.formats.encoders.efficientnet_lite import STRIDE, convolutions
from microvlm.formats.lowered_layer import DENSE_KINDS, FLOAT_EMBEDDING, HALF, HALF_EMBEDDING, LoweredLayer
from microvlm.formats.op_table import MATMUL_BY_KIND

Shapes = Iterator[tuple[str, tuple[int, ...]]]
FLOAT = "float"
COLOUR_LAYERS = ("adapter.whole_colours", "adapter.window_colours")
"""Layers without a bias that read colours, of a model that has them."""
_EMBEDDING, _TABLE = "embedding", "embedding.table"
"""The token table's module, and its name where it is packed."""


class TensorType(NamedTuple):
    """Shape of a tensor, and its kind: `FLOAT`, of any width, since they are converted, or numpy's name of a dtype."""

    shape: tuple[int, ...]
    kind: str


class HasType(Protocol):
    """Anything that says the shape and kind of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...


def weight_shapes(config: MicroVLMConfig) -> dict[str, tuple[int, ...]]:
    """Shape by name of every tensor of a model that is not lowered: the keys of `MicroVLM.state_dict()`."""
    vision, text, memory = config.vision, config.text, config.memory
    narrow, wide, k = vision.hidden_size, text.hidden_size, config.prefix_tokens
    shapes: dict[str, tuple[int, ...]] = {
        "memory_prior": (memory.slots, memory.code_size),
        "adapter.places": (1, k, wide),
        "embedding.weight": (text.vocab_size, wide),
        "decoder.norm.weight": (wide,),
        "memory_encoder.pool": (wide,),
        "memory_encoder.pseudo_inverse": (memory.code_size, memory.slots),
        "memory_encoder.norm.weight": (wide,),
    }
    if vision.is_convolutional:
        shapes |= {name: tensor.shape for name, tensor in _integer_encoder(vision).items()}
        shapes.update(_linear("vision.classifier", vision.num_classes, narrow))
        shapes.update(_linear("vision.window_classifier", vision.num_classes, narrow))
        shapes.update(_linear("adapter.classes", wide, vision.num_classes, bias=False))
        shapes.update(_linear("adapter.whole", wide, vision.features_of_token))
        shapes["adapter.places"] = (1, vision.num_tokens, wide)
        if vision.colours:
            for colours in COLOUR_LAYERS:
                shapes.update(_linear(colours, wide, vision.colours_of_token, bias=False))
        if vision.name_pieces:
            pieces = vision.name_pieces * wide
            shapes.update(_linear("adapter.names", pieces, vision.num_classes, bias=False))
    else:
        shapes.update(_transformer_encoder(vision, k))
    for name in ("norm_mlp", "norm_out"):
        shapes.update(_norm(f"adapter.{name}", wide))
    shapes.update(_linear("adapter.projection", wide, vision.features_of_token))
    shapes.update(_linear("adapter.fc1", 2 * wide, wide))
    shapes.update(_linear("adapter.fc2", wide, 2 * wide))
    for layer in range(text.num_hidden_layers):
        shapes.update(_decoder_layer(f"decoder.layers.{layer}", text))
    for layer in range(memory.encoder_layers):
        shapes.update(_decoder_layer(f"memory_encoder.layers.{layer}", text))
    shapes.update(_linear("memory_encoder.output", memory.code_size, wide, bias=False))
    if memory.readout_size:
        shapes.update(_linear("memory_projection.readout.fc1", memory.readout_size, memory.code_size))
        shapes.update(_linear("memory_projection.readout.fc2", memory.code_size, memory.readout_size))
    shapes.update(_linear("memory_projection.linear", config.memory_kv_outputs, memory.code_size))
    shapes.update(_linear("scope.fc1", SCOPE_WIDTH, memory.code_size + SCOPE_SCALARS))
    shapes.update(_linear("scope.fc2", 1, SCOPE_WIDTH))
    return shapes


def _transformer_encoder(vision: VisionConfig, k: int) -> Shapes:
    """A ViT, and what its adapter pools its tokens into k embeddings with."""
    narrow = vision.hidden_size
    yield "vision.cls_token", (1, 1, narrow)
    yield "vision.position_embeddings", (1, vision.num_tokens, narrow)
    if vision.distillation_token:
        yield "vision.distillation_token", (1, 1, narrow)
    yield from _linear("vision.patch_embedding", narrow, 3 * vision.patch_size**2)
    for layer in range(vision.num_hidden_layers):
        yield from _vision_layer(f"vision.layers.{layer}", narrow, vision.intermediate_size)
    yield from _norm("vision.norm", narrow)
    yield "adapter.queries", (1, k, narrow)
    yield "adapter.pooling_bias", (k, vision.num_tokens)
    yield from _norm("adapter.norm_in", narrow)
    for name in ("query", "key", "value"):
        yield from _linear(f"adapter.{name}", narrow, narrow)


def _integer_encoder(vision: VisionConfig) -> dict[str, TensorType]:
    """The tensors of a convolutional encoder, which are whole numbers and scales at every width of an export."""
    places = (vision.image_size // STRIDE) ** 2
    types = {
        "vision.pixel_scale": TensorType((), FLOAT),
        "vision.pooling": TensorType((vision.num_tokens, places), FLOAT),
    }
    for convolution in convolutions(vision.width_multiplier, vision.depth_multiplier):
        name, outputs = f"vision.{convolution.name}", (convolution.outputs,)
        types |= {
            f"{name}.weight": TensorType(convolution.weight_shape, "uint8"),
            f"{name}.bias": TensorType(outputs, "int32"),
            f"{name}.weight_scale": TensorType(outputs, FLOAT),
            f"{name}.output_scale": TensorType((), FLOAT),
        }
    return types


SCOPE_WIDTH, SCOPE_SCALARS = 64, 5
"""Hidden width of the scope detector, and its features beside those of a latent's components."""


def stored_types(
    config: MicroVLMConfig, layers: Mapping[str, LoweredLayer], origin: object
) -> dict[str, TensorType]:
    """Type by name of every tensor of a model whose `layers` are lowered, as `origin` lists them.

    Raises UserError for a layer that the model does not have, of other sizes, or of a kind of a later version.
    """
    shapes = weight_shapes(config)
    lowered: dict[str, TensorType] = {}
    for name, layer in layers.items():
        base = _EMBEDDING if name == _TABLE else name
        shape = shapes.get(f"{base}.weight", ())
        types = _types_of(layer)
        one_scale = "scale" in types and (layer.kind in DENSE_KINDS or MATMUL_BY_KIND[layer.kind].is_ternary)
        if "scale" in types and layer.scale != layer.rows and not (one_scale and layer.scale == 1):
            raise UserError(f"{origin} lists {quote(name)} with a wrong number of scales: copy it again.")
        is_table = layer.kind in (HALF_EMBEDDING, FLOAT_EMBEDDING) or (
            base == _EMBEDDING and "packed" in types
        )
        fits_name = (base == _EMBEDDING) == is_table and (name == _TABLE) == (is_table and "packed" in types)
        if len(shape) != 2 or not fits_name:
            raise UserError(
                f"{origin} lists a layer {quote(name)} that this model does not have: copy it again."
            )
        bias = shapes.pop(f"{base}.bias", None)
        if shape != (layer.rows, layer.columns) or (bias is not None) != bool(layer.bias):
            raise UserError(
                f"{origin} lists {quote(name)} as {layer.rows} x {layer.columns} with{'' if layer.bias else 'out'} a "
                f"bias, and the configuration as {shape[0]} x {shape[1]} with{'out' if bias is None else ''} one: "
                "copy the model again."
            )
        del shapes[f"{base}.weight"]
        lowered |= {f"{name}.{leaf}": value for leaf, value in types.items()}
        if bias is not None:
            lowered[f"{name}.bias"] = TensorType(bias, FLOAT)
    whole_numbers = _integer_encoder(config.vision) if config.vision.is_convolutional else {}
    return {name: TensorType(shape, FLOAT) for name, shape in shapes.items()} | whole_numbers | lowered


def compare_types(expected: Mapping[str, TensorType], stored: Mapping[str, HasType], origin: object) -> None:
    """Raise UserError, with the tensor's name, unless the file `origin` stores exactly the expected tensors."""
    missing, unexpected = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing:
        raise UserError(
            f"{origin} lacks '{missing[0]}' ({len(missing)} missing keys): it is another model's file."
        )
    if unexpected:
        raise UserError(
            f"{origin} has an unexpected {quote(unexpected[0])} ({len(unexpected)} such keys): it is another "
            "model's file."
        )
    for name, (shape, kind) in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"'{name}' is {stored[name].shape} in {origin} and {shape} in the configuration: "
                "they belong to different models; copy or export it again."
            )
        if stored[name].kind != kind:
            raise UserError(f"'{name}' is {stored[name].kind} in {origin} and should be {kind}.")


def _types_of(layer: LoweredLayer) -> dict[str, TensorType]:
    """The tensors of a lowered layer without its bias, by the last part of their names. Raises UserError."""
    rows, columns = layer.rows, layer.columns
    weight = TensorType((rows, columns), FLOAT)
    if layer.kind in (HALF, HALF_EMBEDDING, FLOAT_EMBEDDING):
        return {"weight": weight}
    if layer.kind in DENSE_KINDS:
        return {"weight": weight, "scale": TensorType((layer.scale or 1,), FLOAT)}
    if layer.kind not in MATMUL_BY_KIND:
        raise UserError(
            f"layers are stored as {quote(layer.kind)}, which this version does not know; upgrade microvlm."
        )
    op = MATMUL_BY_KIND[layer.kind]
    types = op.weight_types(rows, columns, scales=layer.scale or 1)
    return {
        name: TensorType(shape, FLOAT if dtype.startswith("float") else dtype)
        for name, (shape, dtype) in types.items()
    }


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _vision_layer(name: str, width: int, inner: int) -> Shapes:
    yield from _norm(f"{name}.norm_before", width)
    yield from _norm(f"{name}.norm_after", width)
    for leaf in ("query", "key", "value", "output"):
        yield from _linear(f"{name}.{leaf}", width, width)
    yield from _linear(f"{name}.fc1", inner, width)
    yield from _linear(f"{name}.fc2", width, inner)


def _decoder_layer(name: str, text: TextConfig) -> Shapes:
    width, inner, queries = text.hidden_size, text.intermediate_size, text.num_attention_heads * text.head_dim
    yield f"{name}.input_layernorm.weight", (width,)
    yield f"{name}.post_attention_layernorm.weight", (width,)
    yield from _linear(f"{name}.self_attn.q_proj", queries, width, text.attention_bias)
    for leaf in ("k_proj", "v_proj"):
        yield from _linear(f"{name}.self_attn.{leaf}", text.kv_width, width, text.attention_bias)
    yield from _linear(f"{name}.self_attn.o_proj", width, queries, bias=False)
    for leaf in ("gate_proj", "up_proj"):
        yield from _linear(f"{name}.mlp.{leaf}", inner, width, bias=False)
    yield from _linear(f"{name}.mlp.down_proj", width, inner, bias=False)
    if text.sub_norm:
        yield f"{name}.self_attn.sub_norm.weight", (queries,)
        yield f"{name}.mlp.sub_norm.weight", (inner,)
