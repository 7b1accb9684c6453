"""Write a bundle's README.md and example.py, which show how to run its graphs without this package."""

from __future__ import annotations

from pathlib import Path

from microvlm.config import CONFIG, MicroVLMConfig
from microvlm.exporters import contract
from microvlm.exporters.bundle_manifest import MINIMUM_ONNXRUNTIME
from microvlm.exporters.contract import TensorSpec
from microvlm.exporters.elsewhere.genai_files import GENAI_CONFIG
from microvlm.exporters.model_card import MODEL_CARD
from microvlm.formats.bundle import TRANSFORMERS_MODULE
from microvlm.formats.manifest import EXAMPLE, MANIFEST, README
from microvlm.formats.op_table import DOMAIN
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor_files import GENERATION, PREPROCESSOR, check_documents, read_documents
from microvlm.inputs.tokenizer import TOKENIZER
from microvlm.inputs.tokenizer_tables import TABLES

_WITH_TOKENIZER = (
    "`microvlm caption PICTURE --model FOLDER` runs this folder. So does [example.py](example.py), which implements "
    "this page with numpy, Pillow and tokenizers: it answers questions, and writes, reads and forgets facts."
)
_WITHOUT_TOKENIZER = (
    "This bundle has no tokenizer, because its checkpoint had none; it holds the graphs alone."
)
_FOLDED = (
    "Convert questions and facts to lower case first, with single blanks and without full stops at the end: the model "
    "was trained on such text only."
)
_VERBATIM = "Questions and facts are used unchanged."


def write_readme(folder: Path, config: MicroVLMConfig, weights: WeightFormat) -> None:
    """Write FOLDER/README.md with the numbers of this model, and FOLDER/example.py if it has a tokenizer.

    Called before the manifest is written, which lists both.
    """
    has_tokenizer = (folder / TOKENIZER).is_file()
    page = _page(folder, config, weights, has_tokenizer)
    (folder / README).write_text(page, encoding="utf-8")
    if has_tokenizer:
        (folder / EXAMPLE).write_bytes((Path(__file__).parent / "elsewhere" / EXAMPLE).read_bytes())


def _page(folder: Path, config: MicroVLMConfig, weights: WeightFormat, has_tokenizer: bool) -> str:
    usage = _WITH_TOKENIZER if has_tokenizer else _WITHOUT_TOKENIZER
    text, memory, prompt = config.text, config.memory, config.prompt
    side, mark = config.vision.image_size, prompt.image_token
    mean, std, rescale = _pixel_numbers(folder, config)
    line_feeds = " (`\\n` is a line feed)" if "\n" in prompt.template else ""
    return f"""\
# {config.name} as ONNX graphs, {weights.bits:g} bit

{usage} ONNX Runtime {MINIMUM_ONNXRUNTIME} or newer runs the graphs without the microvlm package,
in any language: the operators of the domain `{DOMAIN}` are defined as functions inside the graphs.

| file | content |
|---|---|
{_files(folder, config)}

| graph | inputs | outputs |
|---|---|---|
{_graphs(config)}

LAYER is 0 to {text.num_hidden_layers - 1}.

**Picture.** Rotate the picture upright, lay it on white, and {_framing(config)}.
To scale, first average squares of f x f whole pixels, f = max(1, longer side // {2 * side}); then resize
with Pillow's bicubic filter (a = -.5, widened when it reduces). Convert to float32, channels first, and normalise:
(x * {rescale} - mean) / deviation, with the mean ({mean}) and the deviation ({std}). Grey of 16 bits becomes
round(x / 257) first, transparent pixels are white, and of 16-bit colours the upper byte is kept. The microvlm package
and example.py decode a JPEG at 1/2, 1/4 or 1/8 of its size where that is still twice the side, and rotate last; a
JPEG's pixels then differ by one or two levels of 255.

**Prompt.** The text is `{_escape_line_feeds(prompt.template)}`{line_feeds}, with `{mark}` {config.prefix_tokens} times
for a picture and without it otherwise. Add no other special token and truncate nothing.
{_FOLDED if prompt.fold_text else _VERBATIM}
Replace the rows of `{mark}` in `inputs_embeds` by `image_features`. Pad the rows of a batch on the left.

**Answer.** Run `decoder_model_merged` on the whole prompt, then once for each new token. Position 0 always is the
memory slot, and the text begins at position 1: `past_key_values` start with length 1, as `memory_kv` from
`memory_read`, or zeros without a memory. `attention_mask` has a first column for the slot, which is 1 where
`memory_scope` is at least {memory.scope_threshold:g} and 0 otherwise or without a memory. The positions of a padded row
count its own tokens only. `num_logits_to_keep` = 1 returns the last token's logits. The answer ends with
`{prompt.eos_token}` or an `eos_token_id` of generation_config.json. The model has at most
{text.max_position_embeddings} positions.

**Memory.** The state is a mean [{memory.slots}, {memory.code_size}] and a covariance [{memory.slots}, {memory.slots}];
an empty memory has the prior as its mean and the identity as its covariance. `memory_encode` returns a prompt's latent
(`memory_code`) and its key.

- *Read* with the latent and the key of the question's prompt, then answer with the slot.
- *Write* with the key of the question's prompt, and the latent of prompt and answer as one sequence: the answer's
  tokens follow the prompt's, without `{prompt.eos_token}`.
- *Forget* with exactly the key and latent that were written, so keep them.

A state holds {memory.slots} rows. For more facts use several states, and read the one with the smallest w U w' / w w'
(w: the key, U: the covariance). The graphs include the observation noise, {memory.observation_variance:g}.

**Speed.** The native library of the microvlm package for your processor computes the same bits faster: pass its path,
`microvlm.backends.native.library_path()`, to `SessionOptions.register_custom_ops_library`. It needs only the C++
runtime.
"""


def _pixel_numbers(folder: Path, config: MicroVLMConfig) -> tuple[str, str, str]:
    """(mean, deviation, rescale factor) as text, from preprocessor_config.json if it has them, as in the processor."""
    rescale, mean, std = check_documents(read_documents(folder), config, folder).statistics
    factor_text = "(1 / 255)" if rescale == 1 / 255 else f"{rescale:.9g}"
    return ", ".join(f"{each:g}" for each in mean), ", ".join(f"{each:g}" for each in std), factor_text


def _files(folder: Path, config: MicroVLMConfig) -> str:
    rows = (
        (
            MODEL_CARD,
            f"[`{MODEL_CARD}`]({MODEL_CARD})",
            "what the model knows and what it does not, what it was trained on, its scores",
        ),
        ("onnx", "`onnx/*.onnx`, `*.data`", "the graphs below and their weights (memory-mapped)"),
        (
            GENAI_CONFIG,
            f"`{GENAI_CONFIG}`, `onnx/*.json`",
            "for onnxruntime-genai and optimum, which run `onnx/model.onnx` and `onnx/decoder_genai.onnx`",
        ),
        (CONFIG, f"`{CONFIG}`", "model sizes, prompt template, scope threshold"),
        (
            MANIFEST,
            f"`{MANIFEST}`",
            "inputs and outputs of every graph; sha256 of every other file",
        ),
        (TOKENIZER, "`tokenizer*.json`", "the tokenizer, in the format of the library `tokenizers`"),
        (TABLES, f"`{TABLES}`", "the same tokenizer as tables, used by microvlm only"),
        (GENERATION, f"`{GENERATION}`", "stop tokens, and the largest number of tokens of an answer"),
        (
            PREPROCESSOR,
            f"`{PREPROCESSOR}`",
            "mean, deviation and scale of pixels; its `size` does not say that pictures are fitted",
        ),
        (
            TRANSFORMERS_MODULE,
            f"`{TRANSFORMERS_MODULE}`",
            "for the library transformers: `AutoConfig` and `AutoImageProcessor` with `trust_remote_code=True`",
        ),
        (
            "memory_prior.safetensors",
            "`memory_prior.safetensors`",
            f"`memory_prior` float32 [{config.memory.slots}, {config.memory.code_size}]: mean of the empty memory",
        ),
    )
    return "\n".join(
        f"| {name} | {words} |" for file, name, words in rows if file == MANIFEST or (folder / file).exists()
    )


def _graphs(config: MicroVLMConfig) -> str:
    return "\n".join(
        f"| `{spec.name}` | {_tensors(spec.inputs)} | {_tensors(spec.outputs)} |"
        for spec in contract.graphs(config)
    )


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    """Markdown such as `memory_code` [batch, 192]; the layers' keys and values appear once, with LAYER in the name."""
    tensors = []
    for spec in specs:
        prefix, _, rest = spec.name.partition(".")
        if rest and rest != "0.key":
            continue
        name = f"{prefix}.LAYER.key`, `.value" if rest else spec.name
        shape = ", ".join(map(str, spec.shape))
        dtype = "" if spec.dtype == "float32" else f" {spec.dtype}"
        tensors.append(f"`{name}`{dtype} [{shape}]")
    return "; ".join(tensors)


def _escape_line_feeds(template: str) -> str:
    return template.replace("\n", "\\n")


def _framing(config: MicroVLMConfig) -> str:
    side = config.vision.image_size
    if config.vision.resize == "stretch":
        return f"scale it to {side} x {side}, each side for itself"
    return f"scale it to fit {side} x {side} without stretching, and centre\nit on white"
