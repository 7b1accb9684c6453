"""Two ways to teach a fact, compared: write it into the memory, or train the decoder until the answer is right.

Training gets every advantage: a float32 copy of the decoder, whose weights move without flipping a trit, the fastest of
three learning rates, and AdamW without decay. Needs torch.
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
from microvlm.bench.memory.model_under_test import ModelUnderTest, Query
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
"""Neighbours of each kind that are asked after each fact."""


class Tuned(NamedTuple):
    """One fact trained into the decoder."""

    right: bool
    """Whether the answer was right within `MAX_STEPS` steps."""
    steps: int
    milliseconds: float


def tuning(model: ModelUnderTest, encoded: Encoded, source: str, count: int, threads: int) -> dict[str, Any]:
    """Teaches `count` facts, each to an empty memory and to the decoder as loaded from `source`.

    `write_ms` is encoding question and turn and writing the row, on the model's backend; `write_torch_ms` on torch,
    where the training runs too. `tuned` and `written`: share of right answers for the written picture afterwards,
    `*_paraphrase` for another wording and view, `*_neighbourhood` share of neighbours answered as before.
    """
    runtime = get_backend("torch").load(source, threads)
    assert isinstance(runtime, TorchRuntime)
    student = ModelUnderTest(
        TorchRuntime(widened(runtime.model), directory=runtime.directory), model.processor
    )
    learner = Learner(student)
    rate = min(LEARNING_RATES, key=lambda rate: _cost(learner.learn(encoded.facts[0], rate)))
    rows = []
    for index in range(count):
        fact, others = encoded.facts[index], [*encoded.facts[index + 1 :], *encoded.facts[:index]]
        kinds = neighbours([fact], others, runtime.config.prompt.caption_prompt, NEIGHBOURS)
        queries: list[Query] = [(fact.question, fact.written_view), (fact.paraphrase, fact.query_view)]
        near = [query for kind in kinds.values() for query in kind]
        learner.restore()
        before = student.answers(near, None)
        trained = learner.learn(fact, rate)
        tuned, tuned_near = student.answers(queries, None), student.answers(near, None)
        state = model.remember(encoded.keys[index : index + 1], encoded.values[index : index + 1]).states
        plain_near = model.answers(near, None)
        rows.append(
            {
                "steps": trained.steps,
                "tuning_ms": trained.milliseconds,
                "write_ms": _write_ms(model, fact),
                "write_torch_ms": _write_ms(ModelUnderTest(runtime, model.processor), fact),
                **_scores("tuned", tuned, tuned_near, before, fact),
                **_scores(
                    "written", model.answers(queries, state), model.answers(near, state), plain_near, fact
                ),
            }
        )
    return {"facts": count, "learning_rate": rate, "neighbours": len(near), **_summary(rows)}


def widened(model: MicroVLM) -> MicroVLM:
    """A copy whose decoder and token table are float32, with the dequantised values."""
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
    """Trains the decoder of a `widened` model on one fact at a time, each time from its first weights."""

    def __init__(self, student: ModelUnderTest):
        assert isinstance(student.runtime, TorchRuntime)
        self.student, self.model = student, student.runtime.model
        self._start = copy.deepcopy(self.model.decoder.state_dict())

    def restore(self) -> None:
        """Load the first weights again."""
        self.model.decoder.load_state_dict(self._start)

    def learn(self, fact: Fact, rate: float) -> Tuned:
        """Steps of AdamW until the greedy answer to the question about the written picture is the fact's name."""
        self.restore()
        prompt = self.student.prompt([(fact.question, fact.written_view)])
        processor = self.student.processor
        answer = torch.tensor([*processor.text_ids(fact.name), processor.eos_id])
        turn = self.student.with_answers(prompt, [fact.name])
        embeds, mask = (torch.from_numpy(part.copy()) for part in turn)
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


def _write_ms(model: ModelUnderTest, fact: Fact, repeats: int = 5) -> float:
    """Milliseconds from an embedded prompt to a written row: encode the question, encode the turn, write."""
    runtime, prompt = model.runtime, model.prompt([(fact.question, fact.written_view)])
    turn = model.with_answers(prompt, [fact.name])
    held_memory = hold(runtime, runtime.memory_prior())

    def write() -> None:
        _, key = runtime.memory_encode(*prompt)
        latent, _ = runtime.memory_encode(*turn)
        held_memory.write(key, latent)

    write()
    return median([clock(write) for _ in range(repeats)])


def _scores(
    name: str, answers: Sequence[str], near: Sequence[str], before: Sequence[str], fact: Fact
) -> dict[str, float]:
    same, reworded = answers
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
