"""One fact told in two ways: written into the memory once, or trained into the decoder until it is answered right.

Training gets what helps it: a float32 copy of the decoder, whose weights move without flipping a trit, the learning
rate of three that took least time, and AdamW without decay. Needs torch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microvlm.backends import get_backend
from microvlm.bench.memory.edits import neighbours
from microvlm.bench.memory.fact_sets import Fact
from microvlm.bench.memory.memory_subject import Query, Subject
from microvlm.bench.memory.scores import Encoded
from microvlm.bench.speed.phases import clock
from microvlm.bench.stats import median
from microvlm.memory.in_place import hold
from microvlm.model.embedding import PackedEmbedding, TiedEmbedding
from microvlm.model.linear import DenseTritLinear, HalfLinear, PackedLinear
from microvlm.model.microvlm import MicroVLM
from microvlm.model.torch_runtime import TorchRuntime

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
MAX_STEPS = 100
NEIGHBOURS = 8
"""Of a kind, asked after each fact."""


class Tuned(NamedTuple):
    """One fact trained into the decoder."""

    right: bool
    """Whether the answer was right within `MAX_STEPS` steps."""
    steps: int
    milliseconds: float


def tuning(subject: Subject, encoded: Encoded, source: str, count: int, threads: int) -> dict[str, Any]:
    """`count` facts, each told to an empty memory and to the decoder as it was loaded; `source` is the model's.

    `write_ms` is encoding question and turn and writing the row, on the subject's backend; `write_torch_ms` on torch,
    where the training runs too. `tuned` and `written`: share that is then answered right for the picture of the
    telling, `*_paraphrase` for another wording and view, `*_neighbourhood` share of neighbours answered as before.
    """
    runtime = get_backend("torch").load(source, threads)
    assert isinstance(runtime, TorchRuntime)
    student = Subject(TorchRuntime(widened(runtime.model), directory=runtime.directory), subject.processor)
    learner = Learner(student)
    rate = min(LEARNING_RATES, key=lambda rate: _cost(learner.learn(encoded.facts[0], rate)))
    rows = []
    for index in range(count):
        fact, others = encoded.facts[index], [*encoded.facts[index + 1 :], *encoded.facts[:index]]
        kinds = neighbours([fact], others, runtime.config.prompt.caption_prompt, NEIGHBOURS)
        asked: list[Query] = [(fact.question, fact.written), (fact.paraphrase, fact.asked)]
        near = [query for kind in kinds.values() for query in kind]
        learner.restore()
        before = student.answers(near, None)
        done = learner.learn(fact, rate)
        tuned, tuned_near = student.answers(asked, None), student.answers(near, None)
        state = subject.remember(encoded.keys[index : index + 1], encoded.values[index : index + 1]).states
        plain_near = subject.answers(near, None)
        rows.append(
            {
                "steps": done.steps,
                "tuning_ms": done.milliseconds,
                "write_ms": _write_ms(subject, fact),
                "write_torch_ms": _write_ms(Subject(runtime, subject.processor), fact),
                **_scores("tuned", tuned, tuned_near, before, fact),
                **_scores(
                    "written", subject.answers(asked, state), subject.answers(near, state), plain_near, fact
                ),
            }
        )
    return {"facts": count, "learning_rate": rate, "neighbours": len(near), **_summary(rows)}


def widened(model: MicroVLM) -> MicroVLM:
    """A copy whose decoder and token table are float32 with the values that the stored ones stand for."""
    wide = copy.deepcopy(model)
    for name, module in list(wide.decoder.named_modules()):
        if isinstance(module, PackedLinear | DenseTritLinear | HalfLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(wide.decoder.get_submodule(parent), leaf, _float_linear(module))
    if isinstance(wide.embedding, PackedEmbedding):
        table = TiedEmbedding(0, 0, bits=32)
        packed = wide.embedding.table
        table.weight = nn.Parameter(packed.integers() * packed.scale[:, None], requires_grad=False)
        wide.set_submodule("embedding", table)
    wide.decoder.requires_grad_(True)
    return wide


class Learner:
    """Trains the decoder of a `widened` model on one fact at a time, each from the weights it was made with."""

    def __init__(self, student: Subject):
        assert isinstance(student.runtime, TorchRuntime)
        self.student, self.model = student, student.runtime.model
        self._start = copy.deepcopy(self.model.decoder.state_dict())

    def restore(self) -> None:
        """Back to the weights it was made with."""
        self.model.decoder.load_state_dict(self._start)

    def learn(self, fact: Fact, rate: float) -> Tuned:
        """Steps of AdamW until the greedy answer to the question about the written picture is the fact's name."""
        self.restore()
        prompt = self.student.prompt([(fact.question, fact.written)])
        processor = self.student.processor
        answer = torch.tensor([*processor.text_ids(fact.name), processor.eos_id])
        told = self.student.with_answers(prompt, [fact.name])
        embeds, mask = (torch.from_numpy(part.copy()) for part in told)
        optimizer = torch.optim.AdamW(self.model.decoder.parameters(), lr=rate, weight_decay=0.0)
        began = time.perf_counter()
        for steps in range(MAX_STEPS + 1):
            logits = self.model(embeds, mask)[0, -len(answer) :]
            # Every token right given those before it: what greedy decoding will say.
            if bool((logits.argmax(-1) == answer).all()):
                return Tuned(True, steps, (time.perf_counter() - began) * 1e3)
            if steps == MAX_STEPS:
                break
            optimizer.zero_grad()
            _loss(logits, answer).backward()
            optimizer.step()
        return Tuned(False, MAX_STEPS, (time.perf_counter() - began) * 1e3)


def _loss(logits: Tensor, answer: Tensor) -> Tensor:
    return F.cross_entropy(logits, answer)


def _float_linear(module: PackedLinear | DenseTritLinear | HalfLinear) -> nn.Linear:
    if isinstance(module, PackedLinear):
        weight = module.integers() * module.scale.reshape(-1, 1)
    else:
        weight = module.weight.float()
        if isinstance(module, DenseTritLinear):
            weight = weight * module.scale.reshape(-1, 1)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
    linear.weight = nn.Parameter(weight.clone())
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.float().clone())
    return linear


def _write_ms(subject: Subject, fact: Fact, repeats: int = 5) -> float:
    """From an embedded prompt to a written row: encode the question, encode the turn, write."""
    runtime, prompt = subject.runtime, subject.prompt([(fact.question, fact.written)])
    told = subject.with_answers(prompt, [fact.name])
    held = hold(runtime, runtime.memory_prior())

    def write() -> None:
        _, key = runtime.memory_encode(*prompt)
        code, _ = runtime.memory_encode(*told)
        held.write(key, code)

    write()
    return median([clock(write) for _ in range(repeats)])


def _scores(
    name: str, said: Sequence[str], near: Sequence[str], before: Sequence[str], fact: Fact
) -> dict[str, float]:
    same, reworded = said
    return {
        name: float(same == fact.name),
        f"{name}_paraphrase": float(reworded == fact.name),
        f"{name}_neighbourhood": float(np.mean([a == b for a, b in zip(near, before, strict=True)])),
    }


def _summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians of times and steps, means of shares, and how many times longer training takes than writing."""
    table = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        is_time = name == "steps" or name.endswith("_ms")
        table[name] = round(median(values), 3) if is_time else float(np.mean(values))
    ratio = median([row["tuning_ms"] / row["write_ms"] for row in rows])
    return {**table, "tuning_over_write": round(ratio, 1)}


def _cost(tuned: Tuned) -> tuple[bool, float]:
    return not tuned.right, tuned.milliseconds
