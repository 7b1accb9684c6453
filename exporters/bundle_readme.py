"""What a bundle says of itself: README.md and example.py, for whoever runs its graphs without this package."""

from __future__ import annotations

from pathlib import Path

from microvlm.config import MicroVLMConfig
from microvlm.exporters import contract
from microvlm.exporters.contract import TensorSpec
from microvlm.exporters.manifest import MINIMUM_ONNXRUNTIME
from microvlm.op_table import DOMAIN
from microvlm.weight_format import WeightFormat

README, EXAMPLE = "README.md", "example.py"
_FOLDED = (
    "Questions and facts are first put in lower case, with single blanks and without a full stop at the end: the model "
    "was trained on nothing else."
)
_VERBATIM = "Questions and facts are taken as they are."


def write_readme(folder: Path, config: MicroVLMConfig, weights: WeightFormat, speaks: bool) -> None:
    """Write FOLDER/README.md with the numbers of this model; FOLDER/example.py where it `speaks` (has a tokenizer).

    After the manifest, which does not list them: a bundle is whole whatever its reader makes of them.
    """
    (folder / README).write_text(_text(config, weights, speaks), encoding="utf-8")
    if speaks:
        (folder / EXAMPLE).write_bytes((Path(__file__).parent / "bundle_example.py").read_bytes())


def _text(config: MicroVLMConfig, weights: WeightFormat, speaks: bool) -> str:
    vision, text, memory, prompt = config.vision, config.text, config.memory, config.prompt
    side, mark = vision.image_size, prompt.image_token
    mean, std = (
        ", ".join(f"{value:g}" for value in values) for values in (vision.image_mean, vision.image_std)
    )
    program = (
        "[example.py](example.py) is all of this page as a program with numpy, Pillow and tokenizers: it answers, "
        "writes a fact, reads it and forgets it."
        if speaks
        else "It has no tokenizer: its checkpoint had none."
    )
    return f"""\
# {config.name} as ONNX graphs, {weights.bits:g} bit

`microvlm caption PICTURE --model FOLDER` runs this folder. So does ONNX Runtime {MINIMUM_ONNXRUNTIME} or newer without
that package, in any language: operators of the domain `{DOMAIN}` are functions inside the graphs. {program}

| file | |
|---|---|
| `onnx/*.onnx`, `*.data` | the graphs below, and their weights, which stay mapped |
| `config.json`, `manifest.json` | sizes, template, threshold; every graph's inputs and outputs, every file's sha256 |
| `tokenizer*.json`, `generation_config.json` | the tokenizer, as the library `tokenizers` reads it; an answer's end |
| `tokenizer_tables.safetensors` | the same tokenizer for microvlm on a device; not needed otherwise |
| `memory_prior.safetensors` | `memory_prior` float32 [{memory.slots}, {memory.code_size}]: the empty memory's mean |

| graph | inputs | outputs |
|---|---|---|
{_table(config)}

LAYER is 0 to {text.num_hidden_layers - 1}.

**A picture** is turned upright, laid on white, scaled to fit {side} x {side} (never stretched) and centred on white.
Scaling is bicubic, after whole pixels were averaged by max(1, longer side // {2 * side}). Then, in float32 and channels
first, x * (1 / 255), minus the mean ({mean}), divided by the deviation ({std}). `preprocessor_config.json` has these
numbers, but its `size` does not say that the picture is fitted.

**A prompt** is `{_shown(prompt.template)}`, with `{mark}` {config.prefix_tokens} times for a picture and not at all
without one; no other special token is added. {_FOLDED if prompt.fold_text else _VERBATIM}
In `inputs_embeds` the rows of `{mark}` are replaced by `image_features`. In a batch, rows are padded on the left.

**An answer** comes from `decoder_model_merged`, first with the whole prompt, then token by token. Position 0 is the
memory's slot and always there: text begins at position 1, `past_key_values` are `memory_kv` of `memory_read` or zeros
(length 1), and `attention_mask` has a column in front for it, 1 where `memory_scope` is at least
{memory.scope_threshold:g} and 0 otherwise or without a memory. In a padded row positions count its own tokens.
`num_logits_to_keep` 1 gives the last token's logits. It ends with `{prompt.eos_token}`; {text.max_position_embeddings}
positions is the most.

**The memory** is a mean [{memory.slots}, {memory.code_size}] and a covariance [{memory.slots}, {memory.slots}]; of an
empty one they are the prior and the identity. `memory_encode` of a prompt gives its code and its key. *Read* with both,
then answer with the slot. *Write* with the key of the question's prompt and the code of prompt and answer in one row,
the answer without `{prompt.eos_token}`. *Forget* with that very key and code, so keep them. A state takes
{memory.slots} rows; for more, open another, and read the one where w U w' / w w' is least (w: the key, U: the
covariance). The noise of an observation, {memory.observation_variance:g}, is inside the graphs.

**Faster, the same bits:** register the native library of the microvlm package for your processor
(`SessionOptions.register_custom_ops_library`; the path is `microvlm.backends.native.library_path()`). It needs the C++
runtime and nothing else.
"""


def _table(config: MicroVLMConfig) -> str:
    rows = []
    for spec in contract.graphs(config):
        rows.append(f"| `{spec.name}` | {_tensors(spec.inputs)} | {_tensors(spec.outputs)} |")
    return "\n".join(rows)


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    """As in `memory_code` [batch, 192]; of the keys and values of the layers, one line for all."""
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
