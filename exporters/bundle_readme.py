"""Write a bundle's README.md and example.py, for people who run its graphs without this package."""

from __future__ import annotations

import json
from pathlib import Path

from microvlm.config import MicroVLMConfig
from microvlm.exporters import contract
from microvlm.exporters.bundle_manifest import MINIMUM_ONNXRUNTIME
from microvlm.exporters.contract import TensorSpec
from microvlm.formats.bundle import MANIFEST
from microvlm.formats.op_table import DOMAIN
from microvlm.formats.weight_format import WeightFormat
from microvlm.inputs.processor import GENERATION, PREPROCESSOR
from microvlm.inputs.tokenizer import TOKENIZER
from microvlm.inputs.tokenizer_tables import TABLES

README, EXAMPLE = "README.md", "example.py"
_WITH_TOKENIZER = (
    "`microvlm caption PICTURE --model FOLDER` runs this folder, and so does [example.py](example.py), which is all of "
    "this page as a program with numpy, Pillow and tokenizers: it answers, writes a fact, reads it and forgets it."
)
_WITHOUT_TOKENIZER = "It has no tokenizer, for its checkpoint had none: graphs alone."
_FOLDED = (
    "Questions and facts are first put in lower case, with single blanks and without full stops at the end: the model "
    "was trained on nothing else."
)
_VERBATIM = "Questions and facts are taken as they are."


def write_readme(folder: Path, config: MicroVLMConfig, weights: WeightFormat) -> None:
    """Write FOLDER/README.md with the numbers of this model, and FOLDER/example.py if it has a tokenizer.

    Called after the manifest was written, which lists neither: users may change both and the bundle stays intact.
    """
    has_tokenizer = (folder / TOKENIZER).is_file()
    page = _page(folder, config, weights, has_tokenizer)
    (folder / README).write_text(page, encoding="utf-8")
    if has_tokenizer:
        (folder / EXAMPLE).write_bytes((Path(__file__).parent / "bundle_example.py").read_bytes())


def _page(folder: Path, config: MicroVLMConfig, weights: WeightFormat, has_tokenizer: bool) -> str:
    usage = _WITH_TOKENIZER if has_tokenizer else _WITHOUT_TOKENIZER
    text, memory, prompt = config.text, config.memory, config.prompt
    side, mark = config.vision.image_size, prompt.image_token
    mean, std, rescale = _pixel_numbers(folder, config)
    line_feeds = " (`\\n` is a line feed)" if "\n" in prompt.template else ""
    return f"""\
# {config.name} as ONNX graphs, {weights.bits:g} bit

{usage} ONNX Runtime {MINIMUM_ONNXRUNTIME} or newer runs it without the microvlm package, in
any language: operators of the domain `{DOMAIN}` are functions inside the graphs.

| file | |
|---|---|
{_files(folder, config)}

| graph | inputs | outputs |
|---|---|---|
{_graphs(config)}

LAYER is 0 to {text.num_hidden_layers - 1}.

**A picture** is turned upright, laid on white, scaled to fit {side} x {side} (never stretched) and centred on white.
Scaling is Pillow's bicubic, which averages over what it leaves out (a = -.5), after whole pixels were averaged in
squares of max(1, longer side // {2 * side}). Then, in float32 and channels first, x * {rescale}, minus the mean
({mean}), divided by the deviation ({std}). The package has a JPEG decoded at half, a quarter or an eighth where that
is still twice the side, and turns last: a level or two of 255 in such pictures.

**A prompt** is `{_shown(prompt.template)}`{line_feeds}, with `{mark}` {config.prefix_tokens} times for a picture and
not at all without one; no other special token is added, nothing is cut. {_FOLDED if prompt.fold_text else _VERBATIM}
In `inputs_embeds` the rows of `{mark}` are replaced by `image_features`. In a batch, rows are padded on the left.

**An answer** comes from `decoder_model_merged`, first with the whole prompt, then token by token. Position 0 is the
memory's slot and always there: text begins at position 1, `past_key_values` are `memory_kv` of `memory_read` or zeros
(length 1), and `attention_mask` has a column in front for it, 1 where `memory_scope` is at least
{memory.scope_threshold:g} and 0 otherwise or without a memory. In a padded row positions count its own tokens.
`num_logits_to_keep` 1 gives the last token's logits. It ends with `{prompt.eos_token}`, or with an `eos_token_id` of
generation_config.json; {text.max_position_embeddings} positions is the most.

**The memory** is a mean [{memory.slots}, {memory.code_size}] and a covariance [{memory.slots}, {memory.slots}]; of an
empty one they are the prior and the identity. `memory_encode` of a prompt gives its code and its key. *Read* with
both, then answer with the slot. *Write* with the key of the question's prompt and the code of prompt and answer in
one row: the answer's own tokens behind the prompt's, without `{prompt.eos_token}`. *Forget* with that very key and
code, so keep them. A state takes {memory.slots} rows; for more, open another, and read the one where w U w' / w w' is
least (w: the key, U: the covariance). The noise of an observation, {memory.observation_variance:g}, is inside the
graphs.

**Faster, the same bits:** register the native library of the microvlm package for your processor
(`SessionOptions.register_custom_ops_library`; the path is `microvlm.backends.native.library_path()`). It needs the
C++ runtime and nothing else.
"""


def _pixel_numbers(folder: Path, config: MicroVLMConfig) -> tuple[str, str, str]:
    """(mean, deviation, rescale factor) as text: of preprocessor_config.json where it has them, as in the processor."""
    path = folder / PREPROCESSOR
    document = json.loads(path.read_text()) if path.is_file() else {}
    mean = document.get("image_mean", config.vision.image_mean)
    std = document.get("image_std", config.vision.image_std)
    factor = document.get("rescale_factor", 1 / 255)
    shown = "(1 / 255)" if factor == 1 / 255 else f"{factor:.9g}"
    return ", ".join(f"{each:g}" for each in mean), ", ".join(f"{each:g}" for each in std), shown


def _files(folder: Path, config: MicroVLMConfig) -> str:
    rows = (
        ("onnx", "`onnx/*.onnx`, `*.data`", "the graphs below, and their weights, which stay mapped"),
        ("config.json", "`config.json`", "sizes, template, threshold"),
        (
            MANIFEST,
            f"`{MANIFEST}`",
            "every graph's inputs and outputs; every file's sha256, but this page's and the program's",
        ),
        (TOKENIZER, "`tokenizer*.json`", "the tokenizer, for the library `tokenizers`"),
        (TABLES, f"`{TABLES}`", "the same for microvlm on a device; not needed otherwise"),
        (GENERATION, f"`{GENERATION}`", "what ends an answer, and its longest"),
        (
            PREPROCESSOR,
            f"`{PREPROCESSOR}`",
            "numbers of a picture; that it is fitted, its `size` does not say",
        ),
        (
            "memory_prior.safetensors",
            "`memory_prior.safetensors`",
            f"`memory_prior` float32 [{config.memory.slots}, {config.memory.code_size}]: the empty memory's mean",
        ),
    )
    return "\n".join(f"| {name} | {words} |" for file, name, words in rows if (folder / file).exists())


def _graphs(config: MicroVLMConfig) -> str:
    return "\n".join(
        f"| `{spec.name}` | {_tensors(spec.inputs)} | {_tensors(spec.outputs)} |"
        for spec in contract.graphs(config)
    )


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    """Markdown such as `memory_code` [batch, 192]; the layers' keys and values appear once, with LAYER in the name."""
    shown = []
    for spec in specs:
        prefix, _, rest = spec.name.partition(".")
        if rest and rest != "0.key":
            continue
        name = f"{prefix}.LAYER.key`, `.value" if rest else spec.name
        shape = ", ".join(map(str, spec.shape))
        dtype = "" if spec.dtype == "float32" else f" {spec.dtype}"
        shown.append(f"`{name}`{dtype} [{shape}]")
    return "; ".join(shown)


def _shown(template: str) -> str:
    return template.replace("\n", "\\n")
