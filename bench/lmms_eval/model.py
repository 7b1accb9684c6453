"""The class that lmms-eval calls: prompts with pictures -> answers, and the likelihoods of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from microvlm import load
from microvlm.backends.threads import AUTO, Threads
from microvlm.errors import UserError
from microvlm.generation import GenerationOptions, Prompt, embed_prompt, generate, read_slot, teacher_force
from microvlm.memory.memory_file import open_memory


class MicroVLMModel(lmms):
    """A bundle, a checkpoint or a bundled model.

    pretrained : what `microvlm caption --model` takes.
    backend, threads : of `microvlm.load`.
    memory : a memory file, which every prompt reads.

    `batch_size`, `max_batch_size` and `device` come from lmms-eval; prompts run one by one on the CPU in any case.
    Raises UserError for a bad model and for any other argument.
    """

    def __init__(
        self,
        pretrained: str = "photo",
        backend: str | None = None,
        threads: Threads = None,
        memory: str | None = None,
        **others: Any,
    ):
        super().__init__()
        unknown = sorted(set(others) - {"batch_size", "max_batch_size", "device"})
        if unknown:
            raise UserError(
                f"--model_args {unknown[0]} is not known; choose from pretrained, backend, threads, memory."
            )
        self.loaded = load(pretrained, backend, threads if threads in (None, AUTO) else int(threads))
        self.states = None if memory is None else open_memory(Path(memory), self.loaded.runtime).states

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, cut before the first of its `until` texts. Decoding is greedy unless it samples.

        `max_new_tokens` is at most what the model's positions leave. Raises UserError for what the model cannot read.
        """
        answers = []
        for context, keywords, doc_to_visual, doc_id, task, split in (request.args for request in requests):
            prompt = self._prompt(context, doc_to_visual(self.task_dict[task][split][doc_id]))
            processor, positions = self.loaded.processor, self.loaded.config.text.max_position_embeddings - 1
            room = positions - prompt.inputs_embeds.shape[1]
            wanted = int(keywords.get("max_new_tokens") or processor.max_new_tokens)
            # Harnesses ask for a temperature of 0, and for a sampling that is off, to have greedy answers.
            samples = keywords.get("do_sample", True) and keywords.get("temperature")
            options = GenerationOptions(
                max_new_tokens=max(1, min(wanted, room)),
                temperature=float(keywords["temperature"]) if samples else 0.0,
                top_p=float(keywords.get("top_p") or 1.0),
                stop_tokens=processor.stop_tokens,
            )
            result = generate(self.loaded.runtime, prompt, options, self.states)
            text = _cut(processor.decode(result.tokens[0]).strip(), keywords.get("until") or ())
            self.cache_hook.add_partial("generate_until", (context, keywords), text)
            answers.append(text)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(minus the natural log likelihood of a continuation after a context, whether greedy decoding gives it).

        Minus, because lmms-eval takes the smallest number for the best choice, as all its models return a loss. A
        continuation's blanks at either end are none of the model's: its answers begin without one.
        """
        results = []
        for request in requests:
            context, continuation, *rest = request.args
            pictures: Sequence[Any] = ()
            if rest:
                doc_to_visual, doc_id, task, split = rest
                document = self.task_dict[task][split][doc_id]
                pictures = doc_to_visual(document)
                if callable(continuation):
                    continuation = continuation(document)
            ids = np.array([self.loaded.processor.text_ids(str(continuation).strip())], np.int64)
            prompt = self._prompt(context, pictures)
            slot = read_slot(self.loaded.runtime, prompt, self.states)
            logits = teacher_force(self.loaded.runtime, prompt, ids, slot)[0].astype(np.float64)
            peak = logits.max(-1, keepdims=True)
            shares = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
            chosen = np.take_along_axis(shares, ids.T, 1)
            results.append((float(-chosen.sum()), bool((logits.argmax(-1) == ids[0]).all())))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises UserError: a task of several rounds hands answers back, which this model was not trained for."""
        raise UserError("microvlm answers tasks of one round; choose a task without multi-round generation.")

    def _prompt(self, context: str, pictures: Sequence[Any] | None) -> Prompt:
        """Embed a context and its pictures. Image tokens that a task wrote into it are left to the template."""
        processor = self.loaded.processor
        text = context.replace(processor.config.prompt.image_token, " ").strip()
        inputs = processor([text], [list(pictures or ())])
        return embed_prompt(self.loaded.runtime, *inputs, processor.image_id)


def _cut(text: str, ends: str | Sequence[str]) -> str:
    """The text before the first of `ends`."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text
