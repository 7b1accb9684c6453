"""Decoders from pickles, GGUF files and BitNet checkpoints: the logits of transformers, or one sentence."""

import json
import os
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hf_models import BASE, TOLERANCE, altered, llama, qwen2, save_livened, transformers
from safetensors.torch import load_file, save_file
from test_hf_checkpoint import save_tokenizer

from microvlm.errors import UserError
from microvlm.formats.headers.gguf_header import read_gguf_header
from microvlm.inputs.processor import Processor
from microvlm.model.linear import PackedLinear
from microvlm.model.microvlm import MicroVLM
from microvlm.model.pretrained.assembly import assemble, assemble_checkpoint
from microvlm.model.pretrained.bitnet import unpack_trits

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Q = gguf.GGMLQuantizationType


def logits(model: MicroVLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(model.embed(ids), torch.ones_like(ids))


def token_ids() -> torch.Tensor:
    return torch.randint(0, 90, (2, 11), generator=torch.Generator().manual_seed(1))


# Pickled weights.


def pickled(folder: Path, target: Path, shards: int = 1) -> Path:
    tensors = load_file(folder / "model.safetensors")
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    places = {name: f"pytorch_model-0000{index % shards}.bin" for index, name in enumerate(tensors)}
    for place in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == place}, target / place)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return target


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_give_the_logits_of_transformers(hf_folders, tmp_path, shards):
    root, oracles = hf_folders
    model = assemble(root / "vit", pickled(root / "qwen2", tmp_path / "bin", shards), BASE)
    torch.testing.assert_close(logits(model, token_ids()), oracles["qwen2"](token_ids()).logits, **TOLERANCE)


def test_pickled_weights_of_the_old_format_and_of_an_encoder_load(hf_folders, tmp_path):
    root, _ = hf_folders
    folder = pickled(root / "vit", tmp_path / "bin")
    tensors = load_file(root / "vit" / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    new, old = (assemble(each, root / "llama", BASE, seed=0).state_dict() for each in (root / "vit", folder))
    assert all(torch.equal(new[name], old[name]) for name in new)


class Bomb:
    """An object whose unpickling makes a folder."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_a_pickle_that_runs_code_is_one_sentence_and_runs_nothing(hf_folders, tmp_path):
    root, _ = hf_folders
    folder = pickled(root / "qwen2", tmp_path / "bin")
    for content in ({"x": Bomb(tmp_path / "hit")}, Bomb(tmp_path / "hit")):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="code or objects beside tensors"):
            assemble(root / "vit", folder, BASE)
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(2)], "does not hold tensors by name"),
        ({"model": {"a": torch.ones(1)}}, "something beside tensors"),
        ({1: torch.ones(1)}, "something beside tensors"),
        ({"a": torch.ones(2, 2).to_sparse()}, "no plain tensor"),
        ({"a": torch.ones(1).expand(10**12)}, "'a' is larger than what is stored of it"),
    ],
)
def test_pickles_of_anything_but_tensors_by_name_are_refused(hf_folders, tmp_path, content, sentence):
    root, _ = hf_folders
    folder = pickled(root / "qwen2", tmp_path / "bin")
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=sentence):
        assemble(root / "vit", folder, BASE)


def test_a_damaged_pickle_is_one_sentence(hf_folders, tmp_path):
    root, _ = hf_folders
    folder = pickled(root / "qwen2", tmp_path / "bin")
    content = (folder / "pytorch_model.bin").read_bytes()
    for cut in (0, 1, 100, len(content) // 2, len(content) - 10):
        (folder / "pytorch_model.bin").write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"pytorch_model\.bin"):
            assemble(root / "vit", folder, BASE)


# GGUF files.


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter writes those of Llama."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    folder: Path, path: Path, kinds: dict[str, Q] | None = None, **changes
) -> dict[str, np.ndarray]:
    """Write a Hugging Face folder's decoder as GGUF -> the weights that the file stands for, by transformers' names.

    `kinds`: types by the end of a name; float32 otherwise. `changes` to the metadata; None leaves a key out.
    """
    config = json.loads((folder / "config.json").read_text())
    arch, heads = config["model_type"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(str(path), arch)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "rope.dimension_count": head_dim,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config["vocab_size"],
    } | changes
    for key, value in values.items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{arch}.rope.freq_base", config["rope_parameters"]["rope_theta"])
    add_tokenizer(writer)
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.float().numpy()
        theirs = gguf_name(name)
        kind = next((kind for end, kind in (kinds or {}).items() if theirs.endswith(end)), Q.F32)
        count = {"q_proj": heads, "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
        turned = interleaved(array, count) if arch == "llama" and count else array
        stored = quantize(turned, kind)
        writer.add_tensor(theirs, stored, raw_dtype=kind)
        back = dequantize(stored, kind).reshape(array.shape)
        if arch == "llama" and count:
            back = (
                back.reshape(count, array.shape[0] // count // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)
            )
        weights[name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    _, _, index, *part, leaf = name.split(".")
    return f"blk.{index}.{GGUF_NAMES['.'.join(part)]}.{leaf}"


def add_tokenizer(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:80]
    tokens = [*letters, "<|im_start|>", "<|im_end|>", "<tool>", "ab", "[PAD84]"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 80 + [3, 3, 4, 1, 5])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(81)
    writer.add_chat_template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{{ '<|im_start|>' }}"
    )


@pytest.mark.parametrize("kinds", [{}, {"weight": Q.F16}], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_gguf_files_logits_equal_those_of_transformers(hf_folders, tmp_path, name, kinds):
    root, oracles = hf_folders
    weights = write_gguf(root / name, tmp_path / "decoder.gguf", kinds)
    assemble_checkpoint(root / "vit", tmp_path / "decoder.gguf", BASE, tmp_path / "made")
    model = MicroVLM.from_pretrained(tmp_path / "made")
    torch.testing.assert_close(
        model.decoder.layers[0].self_attn.q_proj.weight,
        torch.from_numpy(weights["model.layers.0.self_attn.q_proj.weight"]),
        rtol=0,
        atol=0,
    )
    if not kinds:
        torch.testing.assert_close(logits(model, token_ids()), oracles[name](token_ids()).logits, **TOLERANCE)
    stored = load_file(tmp_path / "made" / "model.safetensors")["decoder.layers.0.mlp.up_proj.weight"]
    assert stored.dtype == (torch.float16 if kinds else torch.float32)


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.BF16], ids=lambda kind: kind.name)
def test_blocks_are_unpacked_as_transformers_does(tmp_path, hf_folders, kind):
    llama(tmp_path / "wide", intermediate_size=96, head_dim=16)
    path = tmp_path / "decoder.gguf"
    weights = write_gguf(
        tmp_path / "wide", path, {"q.weight": kind, "ffn_down.weight": kind, "embd.weight": kind}
    )
    model = assemble(hf_folders[0] / "vit", path, BASE)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="decoder.gguf", dtype=torch.float32
    )
    state = oracle.state_dict()
    for name in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
        ours = model.decoder.state_dict()[f"layers.1.{name}"]
        assert torch.equal(ours, state[f"model.layers.1.{name}"])
        assert torch.equal(ours, torch.from_numpy(weights[f"model.layers.1.{name}"]))
    torch.testing.assert_close(logits(model, token_ids()), oracle(token_ids()).logits, **TOLERANCE)


def test_a_gguf_files_tokenizer_and_prompt_become_the_checkpoints(hf_folders, tmp_path):
    write_gguf(hf_folders[0] / "llama", tmp_path / "decoder.gguf")
    assemble_checkpoint(hf_folders[0] / "vit", tmp_path / "decoder.gguf", BASE, tmp_path / "made")
    processor = Processor.from_pretrained(tmp_path / "made")
    assert processor.config.prompt.template == "<|im_start|>user\n<image>{prompt}<|im_end|><|im_start|>"
    assert processor.config.prompt.eos_token == "<|im_end|>"
    assert processor.image_id == 84, "rows that a vocabulary was filled up with are free"
    assert processor.text_ids("ab!<tool>") == [83, processor.text_ids("!")[0], 82]
    assert processor.config.text.vocab_size == 90
    assert processor.decode(processor.text_ids("ab<|im_end|>")) == "ab"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope.scaling.type": "yarn"}, "scaled rotary"),
        ({"rope.dimension_count": 8}, "partial rotary"),
        ({"attention.sliding_window": 512}, "sliding-window"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"block_count": None}, "'llama.block_count' is missing"),
        ({"block_count": 10**6}, "'num_hidden_layers' must be a whole number <= 1024"),
        ({"block_count": 3}, "lacks 'model.layers.2"),
        ({"feed_forward_length": 32}, "not .* as its config"),
    ],
)
def test_a_gguf_decoder_that_would_compute_otherwise_is_refused(hf_folders, tmp_path, changes, sentence):
    write_gguf(hf_folders[0] / "llama", tmp_path / "decoder.gguf", **changes)
    with pytest.raises(UserError, match=sentence):
        assemble(hf_folders[0] / "vit", tmp_path / "decoder.gguf", BASE)


def test_every_cut_of_a_gguf_file_is_one_sentence(hf_folders, tmp_path):
    path = tmp_path / "decoder.gguf"
    write_gguf(hf_folders[0] / "llama", path)
    content = path.read_bytes()
    header = read_gguf_header(path)
    end = min(tensor.start for tensor in header.tensors.values())
    for cut in [*range(0, end, 37), *range(end, len(content), 50_001), len(content) - 1]:
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match="damaged"):
            read_gguf_header(path)


def test_absurd_numbers_in_a_gguf_file_are_one_sentence(hf_folders, tmp_path):
    path = tmp_path / "decoder.gguf"
    write_gguf(hf_folders[0] / "llama", path)
    content = path.read_bytes()
    first = content.index(b"general.architecture")
    for place, size in ((4, 4), (8, 8), (16, 8), (24, 8), (first + 20, 4), (first + 24, 8)):
        for value in (2**63, 2**32 - 1, 2**20):
            number = (value % 2 ** (8 * size)).to_bytes(size, "little")
            path.write_bytes(content[:place] + number + content[place + size :])
            with pytest.raises(UserError, match=r"decoder\.gguf"):
                read_gguf_header(path)
    at = content.index(b"output_norm.weight") + 18 + 4 + 8 + 4
    path.write_bytes(content[:at] + struct.pack("<Q", 2**40) + content[at + 8 :])
    with pytest.raises(UserError, match="outside of it"):
        read_gguf_header(path)
    path.write_bytes(content[: at - 4] + struct.pack("<I", 999) + content[at:])
    with pytest.raises(UserError, match="type 999"):
        read_gguf_header(path)


def test_tokenizers_that_cannot_be_converted_exactly_are_refused(hf_folders, tmp_path):
    path = tmp_path / "decoder.gguf"
    write_gguf(hf_folders[0] / "llama", path)
    content = path.read_bytes()
    for old, new, sentence in (
        (b"smollm", b"mpt-30", "'mpt-30', which is not known"),
        (b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert", "'bert' tokenizer cannot be converted"),
        (b"\x03\0\0\0\0\0\0\0a b", b"\x03\0\0\0\0\0\0\0a_b", "no pair of tokens"),
    ):
        assert old in content
        path.write_bytes(content.replace(old, new))
        with pytest.raises(UserError, match=sentence):
            assemble_checkpoint(hf_folders[0] / "vit", path, BASE, tmp_path / "made")
    assert not (tmp_path / "made").exists()


# BitNet checkpoints.


def bitnet(folder: Path, family: str = "llama", **quantization) -> torch.nn.Module:
    """A random BitNet decoder in the packed layout, saved and loaded again by transformers."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}
    options = {"vocab_size": 90, "num_key_value_heads": 2, "tie_word_embeddings": True, "hidden_act": "silu"}
    kind = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}.get(
        family, (transformers.BitNetConfig, transformers.BitNetForCausalLM)
    )
    model = save_livened(kind[1](kind[0](**sizes, **options)), folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "bitnet",
        "modules_to_not_convert": ["lm_head"],
        **quantization,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    if quantization.get("quantization_mode") != "online":
        from transformers.integrations.bitnet import pack_weights

        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if "_proj" in name]:
            weight = tensors[name]
            scale = weight.abs().mean()
            tensors[name] = pack_weights((weight / scale).round().clamp(-1, 1))
            own = 1 / scale if quantization.get("linear_class", "bitlinear") == "bitlinear" else scale
            tensors[f"{name}_scale"] = own.reshape(1)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    del model
    torch.compiler.set_stance("force_eager")
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("llama", {}),
        ("llama", {"linear_class": "autobitlinear"}),
        ("bitnet", {"linear_class": "autobitlinear"}),
        ("bitnet", {"linear_class": "autobitlinear", "quantization_mode": "online"}),
    ],
    ids=["bitlinear", "autobitlinear", "bitnet", "online"],
)
def test_a_bitnet_decoders_logits_equal_those_of_transformers(hf_folders, tmp_path, family, quantization):
    oracle = bitnet(tmp_path / "decoder", family, **quantization)
    save_tokenizer(tmp_path / "decoder")
    assemble_checkpoint(hf_folders[0] / "vit", tmp_path / "decoder", BASE, tmp_path / "made")
    model = MicroVLM.from_pretrained(tmp_path / "made")
    assert model.config.quantization.decoder_bits == 1.58
    assert model.config.text.sub_norm == (family == "bitnet")
    torch.compiler.set_stance("force_eager")
    try:
        with torch.no_grad():
            expected = oracle(token_ids()).logits
    finally:
        torch.compiler.set_stance("default")
    torch.testing.assert_close(logits(model, token_ids()), expected, rtol=1e-4, atol=1e-4)
    if "quantization_mode" not in quantization:
        layer = model.decoder.layers[0].mlp.up_proj
        assert isinstance(layer, PackedLinear)
        packed = load_file(tmp_path / "decoder" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(layer.integers(), unpack_trits(packed).float())


@pytest.mark.parametrize(
    ("quantization", "config", "sentence"),
    [
        ({"use_rms_norm": True}, {}, "'use_rms_norm'"),
        ({"linear_class": "other"}, {}, "'other' layers"),
        ({}, {"hidden_act": "relu2"}, "silu"),
        ({}, {"attention_bias": True}, "attention biases"),
    ],
)
def test_a_bitnet_decoder_that_would_compute_otherwise_is_refused(
    hf_folders, tmp_path, quantization, config, sentence
):
    folder = altered(hf_folders[0] / "llama", tmp_path / "decoder")
    raw = json.loads((folder / "config.json").read_text()) | config
    raw["quantization_config"] = {"quant_method": "bitnet", **quantization}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=sentence):
        assemble(hf_folders[0] / "vit", folder, BASE)


def test_a_damaged_bitnet_weight_is_one_sentence(hf_folders, tmp_path):
    bitnet(tmp_path / "decoder")
    good = load_file(tmp_path / "decoder" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for change, sentence in (
        ({name: torch.full_like(good[name], 3)}, "no trits"),
        ({f"{name}_scale": torch.zeros(1)}, "no number"),
        ({name: good[name][:-1].clone()}, "packed trits"),
        ({name: good[name].float()}, "not packed"),
    ):
        save_file({**good, **change}, tmp_path / "decoder" / "model.safetensors")
        with pytest.raises(UserError, match=sentence):
            assemble(hf_folders[0] / "vit", tmp_path / "decoder", BASE)


def test_a_part_in_the_wrong_place_is_named(hf_folders, tmp_path):
    root, _ = hf_folders
    with pytest.raises(UserError, match=r"qwen2 is a decoder \(qwen2\): give it as --decoder"):
        assemble(root / "qwen2", root / "qwen2", BASE)
    with pytest.raises(UserError, match=r"vit is an encoder \(vit\): give it as --vision"):
        assemble(root / "vit", root / "vit", BASE)
    qwen2(tmp_path / "both")
    write_gguf(root / "llama", tmp_path / "one.gguf")
    shutil.copy(tmp_path / "one.gguf", tmp_path / "two.gguf")
    with pytest.raises(UserError, match="holds 2 GGUF files"):
        assemble(root / "vit", tmp_path, BASE)
