"""Hugging Face directories, with transformers as the oracle: equal features and logits, or a sentence."""

import dataclasses
import json

import pytest
import torch
from conftest import FLOAT, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from microvlm.config import SMOLLM_PROMPT
from microvlm.errors import UserError
from microvlm.hf_config import text_config, vision_config
from microvlm.hf_loading import assemble, assemble_checkpoint
from microvlm.model import MicroVLM

transformers = pytest.importorskip("transformers")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
BASE = dataclasses.replace(tiny_config(FLOAT), text=dataclasses.replace(tiny_config().text, sub_norm=False))
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}


def save_livened(model: torch.nn.Module, directory, **options) -> torch.nn.Module:
    """Random biases and norms too (transformers starts them at 0 and 1), so that a swapped one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(directory, **options)
    return model


def qwen2(directory, **changes):
    torch.manual_seed(1)
    options = {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    }
    config = transformers.Qwen2Config(vocab_size=120, hidden_size=64, **SMALL, **{**options, **changes})
    return save_livened(transformers.Qwen2ForCausalLM(config), directory)


def llama(directory, **changes):
    torch.manual_seed(2)
    options = {"num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    config = transformers.LlamaConfig(vocab_size=90, hidden_size=64, **SMALL, **{**options, **changes})
    return save_livened(transformers.LlamaForCausalLM(config), directory)


def vit_options(**changes):
    return {"hidden_size": 48, "image_size": 24, "patch_size": 8, **SMALL, **changes}


def vit(directory, **changes):
    torch.manual_seed(3)
    return save_livened(transformers.ViTModel(transformers.ViTConfig(**vit_options(**changes))), directory)


def deit(directory, **changes):
    torch.manual_seed(4)
    return save_livened(transformers.DeiTModel(transformers.DeiTConfig(**vit_options(**changes))), directory)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    oracles = {
        name: make(root / name)
        for name, make in {"qwen2": qwen2, "llama": llama, "vit": vit, "deit": deit}.items()
    }
    return root, oracles


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_vision_features_equal_those_of_transformers(folders, name):
    root, oracles = folders
    model = assemble(root / name, root / "llama", BASE)
    pixels = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        expected = oracles[name](pixels).last_hidden_state
        assert model.config.vision.num_leading_tokens + 9 == expected.shape[1]
        torch.testing.assert_close(model.vision(pixels), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_logits_equal_those_of_transformers(folders, name):
    root, oracles = folders
    model = assemble(root / "vit", root / name, BASE)
    ids = torch.randint(0, 90, (2, 11))
    with torch.no_grad():
        expected = oracles[name](ids).logits
        got = model(model.embed(ids), torch.ones_like(ids))
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_left_padding_gives_the_logits_of_transformers_without_padding(folders, name):
    root, oracles = folders
    model = assemble(root / "vit", root / name, BASE)
    ids = torch.randint(0, 90, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :8] = 0, 0
    with torch.no_grad():
        got = model(model.embed(ids), mask)
        for row, start in enumerate((0, 4, 8)):
            expected = oracles[name](ids[row : row + 1, start:]).logits[0]
            torch.testing.assert_close(got[row, start:], expected, **TOLERANCE)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batched = oracles[name](ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[mask.bool()], batched[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_one_token_at_a_time_equals_the_full_forward_of_transformers(folders, name):
    root, oracles = folders
    model = assemble(root / "vit", root / name, BASE)
    ids = torch.randint(0, 90, (2, 8))
    past, mask = model.empty_slot(2), torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        expected = oracles[name](ids).logits
        for step in range(8):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
            position = torch.full((2, 1), step + 1)
            logits, past = model.decode(model.embed(ids[:, step : step + 1]), mask, position, past)
            torch.testing.assert_close(logits[:, 0], expected[:, step], **TOLERANCE)
    assert past[0][0].shape[2] == 9


def test_configurations_are_derived(folders):
    root, _ = folders
    qwen, small = text_config(root / "qwen2"), text_config(root / "llama", sub_norm=True)
    assert (qwen.rope_theta, qwen.attention_bias, qwen.head_dim, qwen.num_key_value_heads) == (
        5e5,
        True,
        16,
        2,
    )
    assert (small.rope_theta, small.attention_bias, small.head_dim, small.sub_norm) == (1e4, False, 24, True)
    assert small.rms_norm_eps == 1e-5
    assert not vision_config(root / "vit").distillation_token
    assert vision_config(root / "deit").distillation_token
    assert vision_config(root / "deit").image_mean == (0.485, 0.456, 0.406)


def test_what_followed_a_shape_of_the_base_follows_the_new_one(folders):
    root, _ = folders
    text = dataclasses.replace(BASE.text, hidden_size=96, num_attention_heads=3)
    memory = dataclasses.replace(BASE.memory, code_size=96)
    default = dataclasses.replace(BASE, text=text, memory=memory, prefix_tokens=0)
    config = assemble(root / "deit", root / "qwen2", default).config
    assert (config.memory.code_size, config.memory.slots, config.prefix_tokens) == (64, 16, 8)
    assert assemble(root / "deit", root / "qwen2", BASE).config.memory.code_size == 48


def test_both_spellings_of_rope_theta_are_read(folders, tmp_path):
    root, _ = folders
    raw = json.loads((root / "qwen2" / "config.json").read_text())
    del raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**raw, "rope_theta": 1e6, "rope_scaling": None}))
    assert text_config(tmp_path).rope_theta == 1e6


def test_the_preprocessor_says_how_pixels_are_normalised(folders, tmp_path):
    root, _ = folders
    (tmp_path / "config.json").write_text((root / "vit" / "config.json").read_text())
    assert vision_config(tmp_path).image_mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]})
    )
    assert vision_config(tmp_path).image_mean == (0.1, 0.2, 0.3)
    assert vision_config(tmp_path).image_std == (1.0, 2.0, 3.0)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert vision_config(tmp_path).image_std == (1.0, 1.0, 1.0)


def test_a_classifier_and_the_names_of_transformers_5_load_too(folders, tmp_path):
    root, oracles = folders
    torch.manual_seed(5)
    classifier = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**vit_options()))
    save_livened(classifier, tmp_path / "classifier")
    oracles["deit"].save_pretrained(tmp_path / "new", save_original_format=False)
    assert "layers.0.attention.q_proj.weight" in load_file(tmp_path / "new" / "model.safetensors")
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        for folder, oracle in (("classifier", classifier.deit), ("new", oracles["deit"])):
            model = assemble(tmp_path / folder, root / "llama", BASE)
            torch.testing.assert_close(model.vision(pixels), oracle(pixels).last_hidden_state, **TOLERANCE)


def test_sharded_and_half_precision_weights_load(folders, tmp_path):
    root, oracles = folders
    oracles["qwen2"].save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    ids = torch.randint(0, 90, (1, 6))
    with torch.no_grad():
        model = assemble(root / "vit", tmp_path / "shards", BASE)
        expected = oracles["qwen2"](ids).logits
        torch.testing.assert_close(model(model.embed(ids), torch.ones_like(ids)), expected, **TOLERANCE)
    half = {key: value.bfloat16() for key, value in load_file(root / "qwen2" / "model.safetensors").items()}
    (tmp_path / "half").mkdir()
    save_file(half, tmp_path / "half" / "model.safetensors")
    (tmp_path / "half" / "config.json").write_text((root / "qwen2" / "config.json").read_text())
    model = assemble(root / "vit", tmp_path / "half", BASE)
    assert model.decoder.norm.weight.dtype == torch.float32
    assert torch.equal(model.decoder.norm.weight, half["model.norm.weight"].float())


def test_inserted_sub_norms_start_at_one_and_ternary_conversion_builds(folders):
    root, _ = folders
    model = assemble(root / "deit", root / "qwen2", tiny_config())
    norms = [v for k, v in model.decoder.state_dict().items() if "sub_norm" in k]
    assert len(norms) == 4
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)
    assert type(model.decoder.layers[0].mlp.up_proj).__name__ == "TernaryLinear"


def test_the_memory_slot_starts_at_the_key_bias_of_the_loaded_decoder(folders):
    root, oracles = folders
    model = assemble(root / "vit", root / "qwen2", BASE)
    bias = model.memory_projection.linear.bias.view(2, 2, -1)
    for layer in range(2):
        assert torch.equal(bias[layer, 0], oracles["qwen2"].model.layers[layer].self_attn.k_proj.bias)
        assert not bias[layer, 1].any()


def save_tokenizer(folder, tokens=("<|im_start|>", "<|im_end|>", "<|endoftext|>")) -> None:
    words = {word: index for index, word in enumerate(["[unk]", "user", "assistant", "what", "is", "this"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))


def test_an_assembled_checkpoint_answers_with_the_decoders_tokenizer(folders, tmp_path):
    root, _ = folders
    decoder = altered(root / "llama", tmp_path / "decoder")
    save_tokenizer(decoder)
    base = dataclasses.replace(BASE, prompt=SMOLLM_PROMPT)
    made = assemble_checkpoint(root / "vit", decoder, base, tmp_path / "made")
    assert made.config.text.vocab_size == 90
    loaded = MicroVLM.from_pretrained(tmp_path / "made")
    picture = Image.new("RGB", (30, 20), "red")
    answers = [model.generate([picture], ["what is this"], max_new_tokens=3) for model in (made, loaded)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 1
    with pytest.raises(UserError, match="not a MicroVLM"):
        assemble_checkpoint(root / "vit", decoder, base, decoder)


def test_a_vocabulary_that_is_full_grows_by_the_image_token(folders, tmp_path):
    root, _ = folders
    decoder = altered(root / "llama", tmp_path / "decoder")
    save_tokenizer(
        decoder, [f"<extra{index}>" for index in range(81)] + ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    )
    made = assemble_checkpoint(
        root / "vit", decoder, dataclasses.replace(BASE, prompt=SMOLLM_PROMPT), tmp_path / "made"
    )
    old = load_file(decoder / "model.safetensors")["model.embed_tokens.weight"]
    assert made.config.text.vocab_size == 91
    assert torch.equal(made.embedding.weight[:90], old)
    torch.testing.assert_close(made.embedding.weight[90], old.mean(0))
    assert torch.equal(MicroVLM.from_pretrained(tmp_path / "made").embedding.weight, made.embedding.weight)


def test_a_tokenizer_that_does_not_fit_the_prompt_leaves_nothing(folders, tmp_path):
    root, _ = folders
    decoder = altered(root / "llama", tmp_path / "decoder")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        assemble_checkpoint(root / "vit", decoder, BASE, tmp_path / "made")
    save_tokenizer(decoder, ["<|im_start|>"])
    with pytest.raises(UserError, match="lacks"):
        assemble_checkpoint(root / "vit", decoder, BASE, tmp_path / "made")
    (decoder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        assemble_checkpoint(root / "vit", decoder, BASE, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def altered(folder, target, drop=(), add=None):
    """A copy of `folder` with tensors taken out or put in."""
    tensors = load_file(folder / "model.safetensors")
    target.mkdir()
    save_file({k: v for k, v in tensors.items() if k not in drop} | (add or {}), target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


@pytest.mark.parametrize(
    ("part", "drop", "add", "said"),
    [
        ("qwen2", ["model.layers.1.mlp.up_proj.weight"], {}, "lacks 'model.layers.1.mlp.up_proj.weight'"),
        ("qwen2", [], {"model.extra.weight": torch.ones(2)}, "unexpected 'model.extra.weight'"),
        ("qwen2", [], {"model.norm.weight": torch.ones(3)}, r"'model.norm.weight' is \(3,\)"),
        ("qwen2", [], {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "only float weights"),
        ("qwen2", [], {"lm_head.weight": torch.ones(120, 64)}, "only tied output heads"),
        ("deit", ["embeddings.cls_token"], {}, "lacks 'embeddings.cls_token'"),
        ("deit", [], {"embeddings.extra": torch.ones(1)}, "unexpected 'embeddings.extra'"),
    ],
)
def test_a_key_that_does_not_fit_is_named(folders, tmp_path, part, drop, add, said):
    root, _ = folders
    folder = altered(root / part, tmp_path / "altered", drop, add)
    parts = {"deit": root / "deit", "qwen2": root / "qwen2", part: folder}
    with pytest.raises(UserError, match=said):
        assemble(parts["deit"], parts["qwen2"], BASE)


def test_a_tied_head_that_was_saved_twice_is_accepted(folders, tmp_path):
    root, _ = folders
    embedding = load_file(root / "qwen2" / "model.safetensors")["model.embed_tokens.weight"]
    folder = altered(root / "qwen2", tmp_path / "twice", add={"lm_head.weight": embedding.clone()})
    model = assemble(root / "vit", folder, BASE)
    assert torch.equal(model.embedding.weight, embedding)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qwen2", {"tie_word_embeddings": False}, "not tied"),
        ("qwen2", {"use_sliding_window": True}, "sliding-window"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding-window"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rotary"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary"),
        ("llama", {"attention_bias": True}, "attention biases"),
        ("llama", {"mlp_bias": True}, "MLP"),
        ("llama", {"hidden_act": "gelu"}, "silu"),
        ("llama", {"model_type": "gemma"}, "'gemma' decoder"),
        ("llama", {"quantization_config": {"quant_method": "bitnet"}}, "quantised"),
        ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
        ("vit", {"model_type": "clip"}, "'clip' encoder"),
        ("vit", {"hidden_act": "quick_gelu"}, "gelu"),
        ("vit", {"qkv_bias": False}, "biases"),
        ("vit", {"num_channels": 1}, "3 channels"),
        ("vit", {"image_size": [224, 192]}, "square"),
    ],
)
def test_an_architecture_that_would_compute_otherwise_is_refused(folders, tmp_path, name, change, said):
    root, _ = folders
    raw = json.loads((root / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    read = vision_config if name == "vit" else text_config
    with pytest.raises(UserError, match=said):
        read(tmp_path)


def test_pickled_missing_and_damaged_weights_are_refused(folders, tmp_path):
    root, _ = folders
    (tmp_path / "config.json").write_text((root / "qwen2" / "config.json").read_text())
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        assemble(root / "vit", tmp_path, BASE)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="never loaded"):
        assemble(root / "vit", tmp_path, BASE)
    (tmp_path / "model.safetensors").write_bytes((root / "qwen2" / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        assemble(root / "vit", tmp_path, BASE)


def test_an_index_that_points_outside_or_nowhere_is_refused(folders, tmp_path):
    root, _ = folders
    (tmp_path / "config.json").write_text((root / "qwen2" / "config.json").read_text())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="beside it"):
        assemble(root / "vit", tmp_path, BASE)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(UserError, match=r"model-00001-of-00001\.safetensors is missing"):
        assemble(root / "vit", tmp_path, BASE)
    index.write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        assemble(root / "vit", tmp_path, BASE)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        assemble(tmp_path, tmp_path, BASE)
