"""Selects parameters by name: whole parts, modules, or ranges of layers, each with a relative learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from microvlm.errors import UserError
from microvlm.formats.documents import quote

_RANGE = re.compile(r"(?P<stem>.+)\.(?:last(?P<last>\d+)|(?P<first>\d+)-(?P<end>\d+))")


def relative_rates(names: Iterable[str], selectors: Mapping[str, float]) -> dict[str, float]:
    """Parameter name -> its rate by the longest selector that matches; names that none matches are left out.

    Raises UserError for a selector that matches no parameter.
    """
    names = list(names)
    rates: dict[str, tuple[int, float]] = {}
    for selector, rate in selectors.items():
        prefixes = _prefixes(selector, names)
        matched = [
            name
            for name in names
            if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
        ]
        if selector == "all":
            matched = names
        if not matched:
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise UserError(f"no parameter is called {quote(selector)}; the model's parts are {parts}.")
        length = 0 if selector == "all" else len(selector.split("."))
        for name in matched:
            if name not in rates or length >= rates[name][0]:
                rates[name] = length, rate
    return {name: rates[name][1] for name in names if name in rates}


def _prefixes(selector: str, names: list[str]) -> list[str]:
    """The modules that a selector names: one, or one for each layer of a range."""
    match = _RANGE.fullmatch(selector)
    if match is None:
        return [selector]
    stem = match["stem"]
    numbers = [name.removeprefix(f"{stem}.").split(".")[0] for name in names if name.startswith(f"{stem}.")]
    layers = sorted({int(number) for number in numbers if number.isdigit()})
    if match["last"] is not None:
        chosen = layers[len(layers) - min(int(match["last"]), len(layers)) :]
    else:
        chosen = [layer for layer in layers if int(match["first"]) <= layer <= int(match["end"])]
        if layers and int(match["end"]) > layers[-1]:
            raise UserError(f"{quote(selector)} names a layer beyond the last one, {layers[-1]}.")
    return [f"{stem}.{layer}" for layer in chosen]
