"""lmms-eval finds the model by its entry point and runs a bundle: `lmms-eval` itself, and the class's two measures.

`pytest tests/elsewhere/lmms.py` with BUNDLES, a folder with bundles of nano and photo: `nox -s elsewhere`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model, list_available_models
from PIL import Image

from microvlm import load
from microvlm.errors import UserError
from microvlm.generation import embed_prompt, prefill, read_slot

ROOT = Path(__file__).parent.parent.parent
NANO = Path(os.environ["BUNDLES"]) / "nano"
PICTURES = {"1f355": "pizza", "1f339": "rose", "1f335": "cactus"}
QUESTION = "what is this?"
UTILS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["picture"])]
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: {target}
{more}
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
metadata: {{version: 0}}
"""


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    pictures = {name: ROOT / f"bench/evalset/images/{name}.png" for name in PICTURES}
    return [
        {
            "picture": str(pictures[name]),
            "question": QUESTION,
            "answer": answer,
        }
        for name, answer in PICTURES.items()
    ]


@pytest.fixture(scope="module")
def model(documents):
    made = get_model("microvlm")(pretrained=str(NANO), backend="ort", batch_size=1, device="cpu")
    made.task_dict = {"task": {"test": documents}}
    return made


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    metadata = {"task": "task", "doc_id": 0, "repeats": 1, "split": "test"}
    return [Instance(kind, each, 0, metadata) for each in arguments]


def visual(document: dict) -> list[Image.Image]:
    return [Image.open(document["picture"])]


def test_the_entry_point_makes_the_model_known():
    assert "microvlm" in list_available_models()
    assert get_model("microvlm").__module__ == "microvlm.bench.lmms_eval.model"


def test_answers_are_those_of_generate(model, documents):
    asked = requests(
        "generate_until",
        *(
            (QUESTION, {"temperature": 0, "max_new_tokens": 4096}, visual, place, "task", "test")
            for place in range(2)
        ),
        (f"<image>\n{QUESTION}", {"until": "z"}, visual, 0, "task", "test"),
    )
    loaded = load(NANO, backend="ort")
    expected = [loaded.generate(documents[place]["picture"], QUESTION) for place in range(2)]
    assert model.generate_until(asked) == [*expected, expected[0].split("z")[0]]


def test_likelihoods_are_those_of_the_tokens_one_by_one(model, documents):
    answers = ("pizza", "a cat")
    asked = [(QUESTION, f" {answer}", visual, 0, "task", "test") for answer in answers]
    results = model.loglikelihood(requests("loglikelihood", *asked))
    loaded = model.loaded
    for answer, (loss, is_greedy) in zip(answers, results, strict=True):
        ids, total, greedy = loaded.processor.text_ids(answer), 0.0, True
        inputs = loaded.processor([QUESTION], [[documents[0]["picture"]]])
        for token in ids:
            prompt = embed_prompt(loaded.runtime, *inputs, loaded.processor.image_id)
            logits = prefill(loaded.runtime, prompt, read_slot(loaded.runtime, prompt, None))[0][
                0, -1
            ].astype(np.float64)
            total -= logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            greedy &= int(logits.argmax()) == token
            longer = np.append(inputs.input_ids, [[token]], 1)
            inputs = inputs._replace(input_ids=longer, attention_mask=np.ones_like(longer))
        assert loss == pytest.approx(total, rel=1e-3)
        assert is_greedy == greedy
    assert results[0][1]
    assert results[0][0] < results[1][0]


def test_the_target_may_be_a_function_of_the_document(model):
    asked = [
        (QUESTION, target, visual, 0, "task", "test")
        for target in ("pizza", lambda document: document["answer"])
    ]
    results = model.loglikelihood(requests("loglikelihood", *asked))
    assert results[0] == results[1]


def test_an_unknown_argument_is_one_sentence():
    with pytest.raises(UserError, match="--model_args speed is not known; choose from pretrained"):
        get_model("microvlm")(pretrained=str(NANO), speed=3)


def test_the_program_evaluates_a_bundle(documents, tmp_path):
    tasks, file = tmp_path / "tasks", tmp_path / "documents.jsonl"
    tasks.mkdir()
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tasks / "utils.py").write_text(UTILS)
    speak = "generation_kwargs: {max_new_tokens: 16, temperature: 0, do_sample: false}"
    for name, kind, target, more, metric in (
        ("microvlm_names", "generate_until", "answer", speak, "exact_match"),
    ):
        text = TASK.format(name=name, file=file, kind=kind, target=target, more=more, metric=metric)
        (tasks / f"{name}.yaml").write_text(text)
    out = tmp_path / "out"
    arguments = {
        "model": "microvlm",
        "model_args": f"pretrained={NANO},backend=ort",
        "tasks": "microvlm_names",
        "include_path": tasks,
        "output_path": out,
        "batch_size": 1,
    }
    command = [sys.executable, "-m", "lmms_eval"]
    command += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    files = list(out.rglob("*results.json"))
    # The program ends with status 0 after an error, too.
    assert len(files) == 1, process.stdout[-3000:] + process.stderr[-3000:]
    results = json.loads(files[0].read_text())["results"]
    loaded = load(NANO, backend="ort")
    right = [loaded.generate(each["picture"], QUESTION) == each["answer"] for each in documents]
    assert results["microvlm_names"]["exact_match,none"] == pytest.approx(np.mean(right))
    assert np.mean(right) > 0
