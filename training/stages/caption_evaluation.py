"""Evaluation of a `captions` stage on held-out samples: losses, alignment, memory, captions to look at, plain text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.atomic import new_file, write_file
from microvlm.inputs.images import load_square
from microvlm.model.checkpoint import read_tensors, write_tensors
from microvlm.model.microvlm import MicroVLM
from microvlm.training.batches.caption_batches import CaptionBatch, plain_exchange
from microvlm.training.batches.conversation_rows import Exchange, prompt_mask
from microvlm.training.batches.picture_views import plain_view
from microvlm.training.batches.sample_texts import IGNORED
from microvlm.training.batches.text_windows import text_windows
from microvlm.training.data.caption_data import CaptionData, CaptionSample
from microvlm.training.loop.run_files import SAMPLES
from microvlm.training.losses.alignment_loss import chance_recall, recall_at_one
from microvlm.training.losses.memory_episodes import read_episodes
from microvlm.training.stages.caption_pictures import prefix_attention
from microvlm.training.stages.caption_statistics import (
    attention_divergence,
    attention_metrics,
    drift_p_value,
    isotropy_metrics,
    mean_by_picture,
)
from microvlm.training.watching import names

if TYPE_CHECKING:
    from microvlm.training.stages.captions import CaptionTask

SAMPLED, CAPTIONED, BATCH = 128, 8, 16
"""Held-out samples that are evaluated, those that are captioned, and samples of a batch."""
CAPTION_TOKENS = 32
PICTURE_PX = 224
BASELINE = "attention.safetensors"
"""File in a stage's folder: attention on a few held-out samples before the first step."""


class CaptionEvaluation:
    """The held-out samples of a run and what is measured on them. Every evaluation sees the same."""

    def __init__(self, task: CaptionTask, text: Path | None):
        self.task, self.text_path = task, text
        self.samples: list[CaptionSample] = []
        self.windows: Tensor | None = None

    def prepare(self) -> None:
        """Read the validation samples, evenly from all data sets, and the text. Raises UserError."""
        sources = [source for source, _ in self.task.data.sources if source.count("validation")]
        for source in sources:
            self.samples += _spread(source, SAMPLED // len(sources))
        if self.text_path is not None:
            self.windows = text_windows(self.text_path, self.task.rows.processor)

    def run(self, folder: Path, step: int) -> dict[str, float]:
        """All metrics, under `evaluation/`; also writes captions of a few pictures into the run's folder."""
        values: dict[str, float] = {}
        if self.samples:
            values |= self._losses()
            self._caption(folder, step)
            attention = self._attention(folder / self.task.stage.name / BASELINE)
            values |= {name: round(value, 6) for name, value in attention.items()}
        if self.windows is not None:
            values["evaluation/text_perplexity"] = text_perplexity(self.task.model, self.windows)
        return values

    def _losses(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        captions: list[str] = []
        for start in range(0, len(self.samples), BATCH):
            samples = self.samples[start : start + BATCH]
            for name, value in self._batch(samples, parts, captions).items():
                totals[name] = totals.get(name, 0.0) + value
        loss = totals["nats"] / max(1.0, totals["tokens"])
        values = {
            names.EVALUATION_LOSS: loss,
            names.EVALUATION_PERPLEXITY: math.exp(min(loss, 50.0)),
            "evaluation/token_accuracy": totals["right"] / max(1.0, totals["tokens"]),
        }
        if parts:
            image, text, latents = (torch.cat(side) for side in zip(*parts, strict=True))
            values["evaluation/alignment_recall_at_1"] = recall_at_one(image, text, captions)
            values["evaluation/alignment_chance"] = chance_recall(captions)
            values |= isotropy_metrics(
                {names.LEJEPA_IMAGE: image, names.LEJEPA_TEXT: text, names.LEJEPA_LATENTS: latents}
            )
        for kind in ("on", "off", "empty"):
            if totals.get("episode_tokens"):
                values[f"evaluation/episode_loss_{kind}"] = (
                    totals[f"episode_{kind}"] / totals["episode_tokens"]
                )
        return {name: round(value, 6) for name, value in values.items()}

    def _batch(
        self, samples: list[CaptionSample], parts: list[tuple[Tensor, Tensor, Tensor]], captions: list[str]
    ) -> dict[str, float]:
        """Sums over one batch; `parts` gets its pictures' and captions' features and its latents, [n, ...] each."""
        task = self.task
        model, vision = task.model, task.config.vision
        prompt = task.config.prompt.caption_prompt
        exchanges: list[Exchange] = []
        views: list[np.ndarray] = []
        captioned: list[tuple[int, int, str]] = []
        for sample in samples:
            turn = next((turn for turn in sample.turns if turn.images), None)
            if turn is None:
                continue
            exchange, shown = plain_exchange(sample, turn, prompt, vision)
            if turn.question is None and len(shown) == 1:
                captioned.append((len(exchanges), len(views), turn.answer))
            exchanges.append(exchange)
            views += shown
        if not exchanges:
            return {"nats": 0.0, "tokens": 0.0, "right": 0.0}
        pixels = torch.from_numpy(np.stack(views).transpose(0, 3, 1, 2).copy())
        prefixes = task.encode(model, pixels)
        rows = task.conversations.build(exchanges).to(prefixes.device)
        embeds = model.place_images(rows.ids, task.rows.processor.image_id, prefixes)
        labelled = rows.labels != IGNORED
        logits = model(embeds, rows.mask, None, None, labelled).float()
        target = rows.labels[labelled]
        totals = {
            "nats": float(F.cross_entropy(logits, target, reduction="sum")),
            "tokens": float(len(target)),
            "right": float((logits.argmax(-1) == target).sum()),
        }
        if captioned:
            which, pictures = (torch.tensor([entry[part] for entry in captioned]) for part in (0, 1))
            which, pictures = which.to(prefixes.device), pictures.to(prefixes.device)
            chosen, labels = embeds[which], rows.labels[which]
            image, text = task.with_heads.alignment.features(prefixes[pictures], chosen, labels)
            latents, _ = model.memory_encode(chosen, prompt_mask(rows.mask[which], labels))
            parts.append((image, text, latents))
            captions += [caption for _, _, caption in captioned]
        if len(captioned) > 1 and task.options.episode_length:
            totals |= self._episodes(samples)
        return totals

    def _episodes(self, samples: list[CaptionSample]) -> dict[str, float]:
        """Losses of one batch's episodes: with what was written, with the slot masked, and with an empty memory."""
        task, model = self.task, self.task.model
        batch: CaptionBatch = task.whole_sampler.batch(samples, np.random.default_rng(0))
        if batch.episodes is None:
            return {}
        prefixes = task.encode(model, batch.pixels)
        reading = read_episodes(
            model,
            task.conversations,
            batch,
            batch.episodes,
            prefixes[torch.from_numpy(batch.captioned).to(prefixes.device)],
            task.rows.processor.image_id,
            task.options.address_log_variance,
            noisy=False,
        )
        answers = batch.episodes.answers.to(prefixes.device)
        questions = batch.episodes.questions.to(prefixes.device)
        labelled = answers.labels != IGNORED
        embeds, target = model.embed(answers.ids), answers.labels[labelled]
        latent, key = model.memory_encode(model.embed(questions.ids), questions.mask)
        _, _, _, empty = model.memory_read(key.float(), latent.float(), *model.memory_reset(len(latent)))
        totals = {"episode_tokens": float(len(target))}
        for name, slot in (("on", reading.slot), ("off", None), ("empty", empty)):
            logits = model(embeds, answers.mask, slot, None, labelled).float()
            totals[f"episode_{name}"] = float(F.cross_entropy(logits, target, reduction="sum"))
        return totals

    def _attention(self, baseline: Path) -> dict[str, float]:
        """Attention to held-out pictures, and how far it has moved since the stage began.

        The file `baseline` keeps attention from before the stage's first step.
        """
        task = self.task
        batch = task.whole_sampler.batch(self.samples[:BATCH], np.random.default_rng(0))
        weights, _ = prefix_attention(task, task.model, batch, BATCH)
        if weights is None:
            return {}
        now = {"attention": torch.cat(weights).cpu(), "pictures": mean_by_picture(weights)}
        values = attention_metrics(now["attention"], "evaluation/attention_")
        if not baseline.is_file():
            with new_file(baseline) as temporary:
                write_tensors(now, temporary)
        before = read_tensors(baseline)[0]
        # A run that an older version began kept fewer pictures.
        if before.keys() != now.keys() or any(before[name].shape != now[name].shape for name in now):
            return values
        values[names.ATTENTION_DIVERGENCE] = attention_divergence(before["attention"], now["attention"])
        p_value = drift_p_value(before["pictures"], now["pictures"])
        return values if p_value is None else values | {names.ATTENTION_DRIFT_P: p_value}

    def _caption(self, folder: Path, step: int) -> None:
        """Caption a few held-out pictures as users would; the answers, and the pictures once, go to `samples`."""
        target = folder / SAMPLES
        target.mkdir(exist_ok=True)
        shown = [sample for sample in self.samples if any(turn.images == (0,) for turn in sample.turns)]
        shown = shown[:: max(1, len(shown) // CAPTIONED)][:CAPTIONED]
        task = self.task
        loaded = task.model.to_loaded_model(task.rows.processor)
        pictures = [plain_view(sample.images[0], task.config.vision) for sample in shown]
        # In float32, as a user's model answers, whatever the stage's precision.
        with torch.autocast(task.model.memory_prior.device.type, enabled=False):
            answers = loaded.generate(pictures, max_new_tokens=CAPTION_TOKENS) if pictures else []
        rows = []
        for number, (sample, answer) in enumerate(zip(shown, answers, strict=True)):
            name = f"{number:02d}.jpg"
            if not (target / name).exists():
                with new_file(target / name) as temporary:
                    load_square(sample.images[0], PICTURE_PX).save(temporary, "JPEG", quality=85)
            truth = next(turn.answer for turn in sample.turns if turn.images == (0,))
            rows.append({"key": sample.key, "picture": name, "truth": truth, "answer": answer})
        write_file(target / f"{step:08d}.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def text_perplexity(model: MicroVLM, windows: Tensor) -> float:
    """exp of the mean cross-entropy of the decoder alone on token windows int64 [n, S], without pictures or memory."""
    device = model.memory_prior.device
    nats, tokens = 0.0, 0
    for part in windows.split(4):
        ids = part.to(device)
        mask = torch.ones_like(ids)
        labelled = torch.ones_like(ids, dtype=torch.bool)
        labelled[:, -1] = False
        logits = model(model.embed(ids), mask, None, None, labelled).float()
        nats += float(F.cross_entropy(logits, ids[:, 1:].reshape(-1), reduction="sum"))
        tokens += ids[:, 1:].numel()
    return math.exp(min(nats / tokens, 50.0))


def _spread(source: CaptionData, count: int) -> list[CaptionSample]:
    """Up to `count` validation samples, evenly spaced."""
    total = source.count("validation")
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
    return [source.sample("validation", int(index)) for index in chosen]
