"""The graphs of a bundle: the contract's, with the model's weights, one behaviour from prefill to decode."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from microvlm.config import MicroVLMConfig
from microvlm.exporters import contract
from microvlm.exporters.external_data import INLINE_BELOW_BYTES, PAGE_ALIGN_ABOVE_BYTES
from microvlm.exporters.replay.graph_probe import expand_layers
from microvlm.exporters.tracing import call, example_inputs
from microvlm.formats.layer_table import LAYERS, MASK
from microvlm.formats.op_table import DOMAIN, OPS
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.lowering import lower

NAMES = [spec.name for spec in contract.graphs(MicroVLMConfig())]
DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}


@pytest.fixture(scope="module")
def lowered(ternary_model):
    return lower(ternary_model, WeightFormat())


@pytest.fixture(scope="module")
def protos(tiny_bundle):
    return {name: onnx.load(tiny_bundle / f"onnx/{name}.onnx", load_external_data=False) for name in NAMES}


@pytest.fixture(scope="module")
def sessions(tiny_bundle):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return {
        name: onnxruntime.InferenceSession(
            str(tiny_bundle / f"onnx/{name}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        for name in NAMES
    }


def described(values) -> list[tuple]:
    return [
        (
            value.name,
            DTYPES[value.type.tensor_type.elem_type],
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_the_inputs_and_outputs_of_the_contract(name, protos, ternary_model):
    spec = contract.graph(ternary_model.config, name)
    graph = protos[name].graph
    assert described(graph.input) == [(t.name, t.dtype, t.shape) for t in spec.inputs]
    assert described(graph.output) == [(t.name, t.dtype, t.shape) for t in spec.outputs]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_valid_and_carries_the_meaning_of_our_operators(name, protos, tiny_bundle):
    onnx.checker.check_model(str(tiny_bundle / f"onnx/{name}.onnx"))
    used_operators = {node.op_type for node in protos[name].graph.node if node.domain == DOMAIN}
    functions = protos[name].functions
    in_layers = {node.op_type for function in functions for node in function.node if node.domain == DOMAIN}
    assert used_operators | in_layers == {function.name for function in functions}
    assert used_operators <= {*OPS, *LAYERS, MASK}
    assert {node.domain for node in protos[name].graph.node} <= {"", DOMAIN}


def test_every_linear_of_decoder_and_memory_encoder_is_one_ternary_product(protos, ternary_model):
    text, memory = ternary_model.config.text, ternary_model.config.memory
    expanded = {name: expand_layers(protos[name])[0] for name in ("decoder_model_merged", "memory_encode")}
    counts = {
        name: sum(node.op_type == "TernaryMatMul2x4" for node in expanded[name].graph.node)
        for name in ("decoder_model_merged", "memory_encode")
    }
    assert counts == {
        "decoder_model_merged": 7 * text.num_hidden_layers,
        "memory_encode": 7 * memory.encoder_layers + 1,
    }


@pytest.mark.parametrize(
    ("name", "is_fused", "operands", "results"),
    [("decoder_model_merged", 1, 6, 3), ("memory_encode", 1, 4, 1), ("vision_encoder", 0, 3, 1)],
)
def test_an_attention_takes_heads_side_by_side_and_its_cache(
    name, is_fused, operands, results, protos, ternary_model
):
    config = ternary_model.config
    layers = {
        "decoder_model_merged": config.text.num_hidden_layers,
        "memory_encode": config.memory.encoder_layers,
        "vision_encoder": config.vision.num_hidden_layers,
    }[name]
    nodes = list(protos[name].graph.node)
    attentions = [node for node in nodes if node.op_type == "Attention"]
    # The vision encoder's graph ends with the adapter's, which has a mask.
    assert len(attentions) == layers + (name == "vision_encoder")
    assert {(len(node.input), len(node.output)) for node in attentions[:layers]} == {(operands, results)}
    for half in ("AttentionInputs2x4", "FeedForward2x4"):
        assert sum(node.op_type == half for node in nodes) == is_fused * layers
    assert not any(node.op_type in ("RotaryEmbedding", "Sigmoid") for node in nodes)
    # Splitting and merging heads is a dozen nodes a layer; what is left are patches and masks.
    assert sum(node.op_type in ("Transpose", "Reshape", "Concat") for node in nodes) < 10


def test_initializers_are_the_lowered_model_key_for_key(protos, lowered, tiny_bundle):
    initializers = {}
    for name in NAMES:
        graph = onnx.load(tiny_bundle / f"onnx/{name}.onnx").graph
        for tensor in graph.initializer:
            value = onnx.numpy_helper.to_array(tensor)
            assert tensor.name not in initializers or np.array_equal(initializers[tensor.name], value)
            initializers[tensor.name] = value
    expected_state = lowered.state_dict()
    expected_state.pop("memory_prior")
    assert set(initializers) == set(expected_state)
    for key, value in expected_state.items():
        assert initializers[key].dtype == value.numpy().dtype
        np.testing.assert_array_equal(initializers[key], value.numpy(), err_msg=key)


def test_large_weights_lie_aligned_in_data_files_and_the_tied_table_lies_there_once(protos):
    shared = {}
    for name, proto in protos.items():
        for tensor in proto.graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if not where:
                assert len(tensor.raw_data) < INLINE_BELOW_BYTES
                continue
            alignment = 4096 if int(where["length"]) > PAGE_ALIGN_ABOVE_BYTES else 64
            assert int(where["offset"]) % alignment == 0
            if tensor.name.startswith("embedding."):
                shared.setdefault(tensor.name, set()).add((where["location"], where["offset"]))
            else:
                assert where["location"] == f"{name}.data"
    assert {location for places in shared.values() for location, _ in places} == {"embedding.data"}
    assert all(len(places) == 1 for places in shared.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "sequence", "past"), [(1, 1, 1), (1, 9, 1), (3, 1, 6), (2, 4, 17)])
def test_one_file_serves_every_batch_sequence_and_past(name, batch, sequence, past, sessions, lowered):
    spec = contract.graph(lowered.config, name)
    sizes = {
        contract.BATCH: batch,
        contract.SEQUENCE: sequence,
        contract.PAST: past,
        contract.TOTAL: past + sequence,
    }
    inputs = example_inputs(spec, sizes, seed=3, vocab_size=lowered.config.text.vocab_size)
    actual = sessions[name].run(None, {t.name: v.numpy() for t, v in zip(spec.inputs, inputs, strict=True)})
    with torch.no_grad():
        expected = call(lowered, spec, inputs)
    for theirs, ours in zip(actual, expected, strict=True):
        assert theirs.shape == tuple(ours.shape)
        # An int8 activation at a tie may round the other way; the exporter makes the exact comparison.
        np.testing.assert_allclose(theirs, ours.numpy(), atol=0.2)


class Decoder:
    """The decoder graph with its cache, one sequence a row."""

    def __init__(self, session, config, slot_seed: int | None = None, scale: float = 1.0):
        self.session, self.text = session, config.text
        rng = np.random.default_rng(slot_seed)
        shape = (1, self.text.num_key_value_heads, 1, self.text.head_dim)
        self.past = [
            (rng.normal(size=shape) * scale).astype(np.float32)
            if slot_seed is not None
            else np.zeros(shape, np.float32)
            for _ in range(2 * self.text.num_hidden_layers)
        ]

    def __call__(self, embeds: np.ndarray, slot_seen: int, keep: int) -> np.ndarray:
        length, past = embeds.shape[1], self.past[0].shape[2]
        mask = np.ones((1, past + length), np.int64)
        mask[0, 0] = slot_seen
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": np.arange(past, past + length)[None],
            "num_logits_to_keep": np.array(keep),
            **dict(
                zip(contract.kv_names("past_key_values", self.text.num_hidden_layers), self.past, strict=True)
            ),
        }
        logits, *self.past = self.session.run(None, feeds)
        return logits


def embeddings(config, length: int) -> np.ndarray:
    return np.random.default_rng(8).normal(size=(1, length, config.text.hidden_size)).astype(np.float32)


def test_decoding_step_by_step_gives_the_logits_of_one_prefill(sessions, ternary_model):
    config, session = ternary_model.config, sessions["decoder_model_merged"]
    embeds = embeddings(config, 7)
    prefill = Decoder(session, config, slot_seed=1)
    at_once = prefill(embeds, 1, 7)
    stepwise = Decoder(session, config, slot_seed=1)
    steps = [stepwise(embeds[:, :3], 1, 3), *(stepwise(embeds[:, i : i + 1], 1, 1) for i in range(3, 7))]
    np.testing.assert_allclose(np.concatenate(steps, 1), at_once, atol=1e-4)
    for step_cache, whole_cache in zip(stepwise.past, prefill.past, strict=True):
        np.testing.assert_allclose(step_cache, whole_cache, atol=1e-4)


def test_only_the_asked_for_logits_come_back(sessions, ternary_model):
    config, session = ternary_model.config, sessions["decoder_model_merged"]
    embeds = embeddings(config, 5)
    every = Decoder(session, config)(embeds, 0, 5)
    np.testing.assert_array_equal(Decoder(session, config)(embeds, 0, 2), every[:, 3:])


def test_a_masked_slot_changes_no_bit_whatever_it_holds(sessions, ternary_model):
    config, session = ternary_model.config, sessions["decoder_model_merged"]
    embeds = embeddings(config, 6)
    empty = Decoder(session, config)(embeds, 0, 6)
    for scale in (1.0, 1e4):
        np.testing.assert_array_equal(Decoder(session, config, 2, scale)(embeds, 0, 6), empty)


def test_an_open_slot_changes_the_logits(sessions, ternary_model):
    config, session = ternary_model.config, sessions["decoder_model_merged"]
    embeds = embeddings(config, 6)
    logits, other_logits = (Decoder(session, config, seed)(embeds, 1, 6) for seed in (2, 3))
    assert np.abs(logits - other_logits).max() > 1e-3


def test_padding_on_the_left_changes_no_answer(sessions, ternary_model):
    """A row padded on the left, in a batch with a longer one, has the logits it has alone."""
    config, session = ternary_model.config, sessions["decoder_model_merged"]
    embeds = embeddings(config, 4)
    single_logits = Decoder(session, config)(embeds, 0, 1)
    text = config.text
    padded = np.concatenate([np.full((1, 3, text.hidden_size), 7, np.float32), embeds], 1)
    batch = np.concatenate([padded, embeddings(config, 7)])
    mask = np.ones((2, 8), np.int64)
    mask[:, 0] = 0
    mask[0, 1:4] = 0
    slot = np.zeros((2, text.num_key_value_heads, 1, text.head_dim), np.float32)
    feeds = {
        "inputs_embeds": batch,
        "attention_mask": mask,
        "position_ids": np.array([[1, 1, 1, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]),
        "num_logits_to_keep": np.array(1),
        **dict.fromkeys(contract.kv_names("past_key_values", text.num_hidden_layers), slot),
    }
    logits = session.run(["logits"], feeds)[0]
    np.testing.assert_allclose(logits[0], single_logits[0], atol=1e-4)


def test_forgetting_undoes_writing(sessions, ternary_model):
    spec = contract.graph(ternary_model.config, "memory_write")
    sizes = {contract.BATCH: 2}
    inputs = example_inputs(spec, sizes, seed=4)
    feeds = {t.name: v.numpy() for t, v in zip(spec.inputs, inputs, strict=True)}
    mean, covariance = sessions["memory_write"].run(None, feeds)
    assert np.abs(mean - feeds["memory_mean"]).max() > 0.1
    forget_feeds = {**feeds, "memory_mean": mean, "memory_cov": covariance}
    back, covariance_back = sessions["memory_forget"].run(None, forget_feeds)
    # Forgetting divides by what is left of the covariance, a hundredth: float32 leaves 1e-3 of it.
    np.testing.assert_allclose(back, feeds["memory_mean"], atol=1e-2)
    np.testing.assert_allclose(covariance_back, feeds["memory_cov"], atol=1e-2)
