"""The light clean-up of a traced graph: names, dead nodes, identities. Never touches a weight."""

from __future__ import annotations

import onnx_ir


def tidy(model: onnx_ir.Model, prefix: str) -> None:
    """In place: strip `prefix` from initializer names."""
    for value in list(model.graph.initializers.values()):
        if value.name.startswith(prefix):
            value.name = value.name.removeprefix(prefix)
