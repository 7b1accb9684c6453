"""The page of `microvlm-train watch`: one HTML file that needs no other file, no script and no network."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from microvlm.training.loop.run_files import METRICS, SAMPLES
from microvlm.training.watching import names
from microvlm.training.watching.metrics_file import Row
from microvlm.training.watching.plots import panel_svg, present
from microvlm.training.watching.progress import duration
from microvlm.training.watching.run_reader import LARGEST_PICTURE, RunView, Sample, numbers

_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_WORDS = {
    "attention": "Attention: text tokens x prefix embeddings",
    "addressing": "Addressing: steps x slots",
}
_ADVICE = {
    "silent": "It may have been killed. Run the same microvlm-train command again to go on from its last state.",
    "stopped": "Run the same microvlm-train command again to go on.",
    "new": "Nothing has been logged yet.",
}
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1240px;margin:24px auto;padding:0 16px;color:#222;background:#fafafa}
h1{font-size:21px;margin:0}h2{font-size:16px;margin:28px 0 8px}
.state{display:inline-block;padding:1px 10px;border-radius:10px;color:#fff;background:#666}
.running{background:#0b6e8f}.finished{background:#47761e}.failed,.silent{background:#b3341b}
.cards{display:flex;flex-wrap:wrap;gap:12px}.card{background:#fff;border:1px solid #ddd;border-radius:6px;padding:8px}
.card img{max-width:100%;display:block}.caption{width:224px}.caption p{margin:4px 0;overflow-wrap:anywhere}
.faint{color:#777}table{border-collapse:collapse;background:#fff}
td,th{border:1px solid #ddd;padding:3px 9px;text-align:right}
td:first-child,th:first-child{text-align:left}progress{width:100%;height:14px}
"""


def page(view: RunView, refresh: int | None = None) -> str:
    """The page as HTML. refresh : seconds after which a browser loads it again."""
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    body = [
        _head(view),
        _curves(view),
        _evaluations(view.evaluations),
        _pictures(view),
        _captions(view),
        _files(view),
    ]
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{again}<title>{escape(view.name)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _head(view: RunView) -> str:
    status = view.status
    advice = _ADVICE.get(view.state, "")
    parts = [
        f'<h1>{escape(view.name)} <span class="state {escape(view.state)}">{escape(view.state)}</span></h1>',
        f"<p>{escape(view.reason)} {escape(advice)}</p>" if view.reason or advice else "",
    ]
    if status.steps:
        left = view.seconds_left
        facts = [
            f"stage {status.stage}: step {status.stage_step} of {status.stage_steps}",
            f"all stages: step {status.step} of {status.steps}",
            *([f"{duration(left)} left"] if left is not None else []),
        ]
        parts.append(f'<progress max="{status.steps}" value="{min(status.step, status.steps)}"></progress>')
        parts.append(f"<p>{escape(', '.join(facts))}</p>")
    shown = (
        names.LOSS,
        names.LM_LOSS,
        names.SAMPLES_PER_SECOND,
        names.TOKENS_PER_SECOND,
        names.TRAINABLE_PARAMS,
        names.TOTAL_PARAMS,
        names.MODEL_MEMORY,
    )
    cells = [
        f"<tr><td>{escape(name)}</td><td>{_number(value)}</td>"
        f'<td class="faint">{escape(names.MEANINGS[name])}</td></tr>'
        for name in shown
        if (value := view.last(name)) is not None
    ]
    return "".join(parts) + (f"<table>{''.join(cells)}</table>" if cells else "")


def _curves(view: RunView) -> str:
    cards = [
        f'<div class="card">{_image(panel_svg(view.rows, panel), "image/svg+xml", panel.title)}</div>'
        for panel in present(view.rows)
    ]
    return f'<h2>Curves</h2><div class="cards">{"".join(cards)}</div>' if cards else ""


def _evaluations(rows: list[Row]) -> str:
    """A column for the first and the last evaluation of each stage."""
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stages.setdefault(str(row.get("stage", "")), []).append(row)
    chosen = [row for own in stages.values() for row in (own[:1] + own[-1:] if len(own) > 1 else own)]
    keys = list(dict.fromkeys(key for row in chosen for key in numbers(row)))
    if not keys:
        return ""
    head = "".join(f"<th>{escape(str(row.get('stage', '')))}<br>step {row['step']}</th>" for row in chosen)
    lines = [
        f"<tr><td>{escape(key)}</td>"
        + "".join(f"<td>{_number(row[key]) if key in numbers(row) else ''}</td>" for row in chosen)
        + "</tr>"
        for key in keys
    ]
    return f"<h2>Held-out samples</h2><table><tr><th>metric</th>{head}</tr>{''.join(lines)}</table>"


def _pictures(view: RunView) -> str:
    parts = []
    for kind, paths in view.pictures.items():
        cards = [
            f'<div class="card">{image}<span class="faint">{escape(path.name)}</span></div>'
            for path in dict.fromkeys((paths[0], paths[-1]))
            if (image := _picture(path))
        ]
        if cards:
            parts.append(
                f'<h2>{escape(_WORDS.get(kind, kind))}</h2><div class="cards">{"".join(cards)}</div>'
            )
    return "".join(parts)


def _captions(view: RunView) -> str:
    """Every held-out picture with its own text, the first answer and the last one."""
    if not view.samples:
        return ""
    (first, early), (last, late) = next(iter(view.samples.items())), list(view.samples.items())[-1]
    before = {sample.picture: sample.answer for sample in early} if first != last else {}
    cards = [_caption(view.folder / SAMPLES, sample, before, first, last) for sample in late]
    return f'<h2>Captions of held-out pictures</h2><div class="cards">{"".join(cards)}</div>'


def _caption(folder: Path, sample: Sample, before: dict[str, str], first: int, last: int) -> str:
    # A name with a folder in it could lead anywhere on this machine.
    inside = Path(sample.picture).name == sample.picture
    image = _picture(folder / sample.picture) if inside else ""
    early = before.get(sample.picture)
    lines = [
        f"<p><b>{escape(sample.answer) or '(nothing)'}</b> <span class='faint'>step {last}</span></p>",
        f"<p>{escape(early) or '(nothing)'} <span class='faint'>step {first}</span></p>"
        if early is not None
        else "",
        f"<p class='faint'>its text: {escape(sample.truth)}</p>",
    ]
    return f'<div class="card caption">{image}{"".join(lines)}</div>'


def _files(view: RunView) -> str:
    paths = [str(path) for path in view.checkpoints] or ["none yet"]
    return (
        f"<h2>Files</h2><p>Checkpoints: {escape(', '.join(paths))}</p>"
        f'<p class="faint">Every number is in {escape(str(view.folder / METRICS))}.</p>'
    )


def _picture(path: Path) -> str:
    """A picture file in place, or nothing if it is missing, large, or neither PNG nor JPEG."""
    try:
        content = path.read_bytes() if path.stat().st_size <= LARGEST_PICTURE else b""
    except OSError:
        return ""
    kind = next((kind for magic, kind in _TYPES.items() if content.startswith(magic)), None)
    return _image(content, kind, path.stem) if kind else ""


def _image(content: bytes, kind: str, words: str) -> str:
    return f'<img alt="{escape(words)}" src="data:{kind};base64,{base64.b64encode(content).decode()}">'


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.4g}"
