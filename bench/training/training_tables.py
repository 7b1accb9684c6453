"""The report of a training run as tables. Trains nothing."""

from __future__ import annotations

from microvlm.bench.tables import Report, Table
from microvlm.bench.training.training_records import SeveralCosts, StageSummary, TrainingReport

_EVALUATIONS = {
    "evaluation/loss": "caption loss, held out (nats a token)",
    "evaluation/kl": "KL from the teacher, held out (nats a token)",
    "evaluation/text_loss": "cross-entropy of texts, held out (nats a token)",
    "evaluation/token_accuracy": "next token right, held out",
    "evaluation/alignment_recall_at_1": "picture's own caption nearest (R@1)",
    "evaluation/alignment_chance": "R@1 by chance",
    "evaluation/episode_loss_on": "episodes, memory on (nats a token)",
    "evaluation/episode_loss_off": "episodes, memory masked",
    "evaluation/episode_loss_empty": "episodes, memory empty",
    "evaluation/text_perplexity": "perplexity of plain text",
    "attention/divergence": "attention moved since the stage began (nats)",
    "attention/drift_p": "p of that drift",
    "lejepa/image_features": "LeJEPA statistic of alignment features (1.05: even)",
    "lejepa/memory_latents": "LeJEPA statistic of memory latents (1.05: even)",
}


def report(document: TrainingReport) -> Report:
    stages = document.stages
    heads = [stage.name for stage in stages]
    length = [
        ["", *heads],
        ["steps", *(f"{stage.steps:,}" for stage in stages)],
        ["samples", *(f"{stage.samples:,}" for stage in stages)],
        ["parameters that learn", *(f"{stage.trainable_params:,}" for stage in stages)],
        ["seconds of steps", *(f"{stage.seconds:,.0f}" for stage in stages)],
        ["samples a second", *(f"{stage.samples_per_second:.2f}" for stage in stages)],
        ["tokens a second", *(f"{stage.tokens_per_second:.1f}" for stage in stages)],
        ["training loss, first steps", *(f"{stage.loss_first:.3f}" for stage in stages)],
        ["training loss, last steps", *(f"{stage.loss_last:.3f}" for stage in stages)],
    ]
    rows = [["", *(f"{stage.name}: {when}" for stage in stages for when in ("before", "after"))]]
    for name, label in _EVALUATIONS.items():
        moments = [value for stage in stages for value in (stage.before, stage.after)]
        # The loss of a stage on text alone is one of those that have rows of their own.
        values = [
            None if name == "evaluation/loss" and "evaluation/text_loss" in moment else moment.get(name)
            for moment in moments
        ]
        if any(value is not None for value in values):
            rows.append([label, *("" if value is None else f"{value:.4g}" for value in values)])
    tables = [Table("stages", "stages", length), Table("evaluations", "before and after each stage", rows)]
    tables += [
        Table(f"curve-{stage.name}", f"evaluations of {stage.name}", _curve(stage))
        for stage in stages
        if len(stage.curve) > 2
    ]
    devices = [stage for stage in stages if stage.sharding]
    if devices:
        tables.append(Table("devices", "processes and memory", _devices(devices)))
    samples = "" if document.samples is None else f", {document.samples:,} training samples"
    remarks = [
        f"recipe '{document.recipe}', model {document.model}, data '{document.data}'{samples}; "
        f"{document.wall_seconds / 60:.1f} minutes in all, {document.peak_rss_bytes / 1e9:.2f} GB at most"
    ]
    return Report(f"training run '{document.recipe}'", tables, remarks)


def _curve(stage: StageSummary) -> list[list[str]]:
    """A row for each evaluation. Its loss is the divergence from the teacher where there is one."""
    named = {
        "evaluation/kl": "KL from the teacher, nats a token",
        "evaluation/top1": "same likeliest token",
        "evaluation/text_loss": "cross-entropy, nats",
    }
    known = [name for name in named if name in stage.curve[0].figures] or ["evaluation/loss"]
    heads = [named.get(name, "loss, held out (nats a token)") for name in known]
    rows = [["steps", "tokens", "minutes of steps", *heads]]
    for point in stage.curve:
        figures = [f"{point.figures[name]:.3f}" if name in point.figures else "" for name in known]
        rows.append([f"{point.step:,}", f"{point.tokens:,.0f}", f"{point.seconds / 60:.1f}", *figures])
    return rows


def _devices(stages: list[StageSummary]) -> list[list[str]]:
    head = (
        "stage",
        "processes",
        "sharding",
        "device",
        "peak of a step, GB each",
        "seconds a step",
        "loss, last",
    )
    rows = [[*head]]
    for stage in stages:
        peaks = ", ".join(f"{peak / 1e9:.2f}" for peak in stage.step_peak_bytes)
        seconds, loss = f"{stage.seconds / max(1, stage.steps):.1f}", f"{stage.loss_last:.4f}"
        rows.append([stage.name, str(stage.processes), stage.sharding, stage.device, peaks, seconds, loss])
    return rows


def costs_report(document: SeveralCosts) -> Report:
    """Predicted costs as one table."""
    rows = [["recipe", "pictures", "parameters that learn", "predicted hours", "predicted GB"]]
    for costs in document.recipes:
        for stage in costs.stages:
            hours = f"{stage.predicted_hours_low:.2g}-{stage.predicted_hours_high:.2g}"
            rows.append(
                [
                    costs.recipe,
                    f"{costs.samples:,}",
                    f"{stage.trainable_params:,}",
                    hours,
                    f"{stage.predicted_bytes / 1e9:.1f}",
                ]
            )
    first = document.recipes[0]
    low, high = first.assumed.utilisation_low, first.assumed.utilisation_high
    remarks = [
        f"predicted for {first.machine} and the model {first.model}, at {low:.0%} to {high:.0%} of the peak that its "
        "maker states; nothing here is measured"
    ]
    return Report("predicted costs of training", [Table("costs", "predicted costs", rows)], remarks)
