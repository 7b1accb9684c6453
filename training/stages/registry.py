"""The tasks that a recipe's stages may name. A new kind of stage is one module and one entry."""

from __future__ import annotations

import importlib

from microvlm.errors import UserError
from microvlm.formats.documents import quote
from microvlm.training.stages.task import Task

TASKS = {
    "captions": "microvlm.training.stages.captions:CaptionTask",
    "texts": "microvlm.training.stages.texts:TextTask",
    "distill": "microvlm.training.emoji.stages.distill:DistillTask",
    "vlm": "microvlm.training.emoji.stages.vlm:VLMTask",
    "recall": "microvlm.training.emoji.stages.recall:RecallTask",
    "scope": "microvlm.training.emoji.stages.scope:ScopeTask",
    "photo-classes": "microvlm.training.photo.stages.classify:ClassifyTask",
    "photo-names": "microvlm.training.photo.stages.name:NameTask",
    "photo": "microvlm.training.photo.stages.answer:AnswerTask",
    "photo-answers-names": "microvlm.training.photo.stages.finish:AnswerAndNameTask",
    "photo-finish": "microvlm.training.photo.stages.finish:FinishTask",
    "photo-memory": "microvlm.training.photo.stages.remember:MemoryTask",
}
"""A stage's `task` in a recipe -> where the class is that trains it."""


def task_class(name: str, stage: str) -> type[Task]:
    """The class of a task. Raises UserError, which names the `stage`, for an unknown one."""
    if name not in TASKS:
        raise UserError(f"stage '{stage}': unknown task {quote(name)}; use one of {', '.join(TASKS)}.")
    module, _, attribute = TASKS[name].partition(":")
    found: type[Task] = getattr(importlib.import_module(module), attribute)
    return found
