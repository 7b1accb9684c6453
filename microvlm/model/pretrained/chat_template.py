"""Renders a chat template in a process of its own, and is that process: Jinja's sandbox with limits on time and memory.

A chat template is a program of whoever made the model. The sandbox keeps it from Python's attributes; the limits end
one that loops or fills the memory. Reads one JSON document on stdin (`template`, `variables`), prints one on stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from microvlm.errors import UserError
from microvlm.escaping import printable

_SECONDS = 20
_MEMORY_BYTES = 1 << 30
_LONGEST_RESULT = 1_000_000


class TemplateError(UserError):
    """A template that cannot be rendered; the text says why, as a clause."""


def render(template: str, variables: dict[str, Any]) -> str:
    """The text of a Jinja template. Raises TemplateError, and UserError where Jinja is not installed."""
    request = json.dumps({"template": template, "variables": variables})
    try:
        process = subprocess.run(
            [sys.executable, "-m", __name__], input=request, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise TemplateError(f"it takes more than {_SECONDS} seconds") from None
    try:
        answer = json.loads(process.stdout)
    except ValueError:
        raise TemplateError("it takes too much time or memory") from None
    if "missing" in answer:
        raise UserError("a chat template needs Jinja: pip install 'microvlm[train]'.")
    if "problem" in answer:
        raise TemplateError(printable(answer["problem"])[:200])
    return str(answer["text"])


def _answer(template: str, variables: dict[str, Any]) -> dict[str, Any]:
    try:
        from jinja2.exceptions import TemplateError as JinjaError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return {"missing": "jinja2"}

    def raise_exception(message: str) -> None:
        raise JinjaError(message)

    # As transformers renders templates; without `strftime_now`, so that no date of today becomes part of a model.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        text = environment.from_string(template).render(**variables)
    except Exception as error:  # the template's own: any kind
        return {"problem": str(error) or type(error).__name__}
    return {"text": text} if len(text) <= _LONGEST_RESULT else {"problem": "its text is too long"}


def _limit() -> None:
    try:
        import resource
    except ImportError:  # not on Windows, where the time alone is limited
        return
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


def main() -> None:
    """Answer the request on stdin."""
    request = json.loads(sys.stdin.read())
    _limit()
    print(json.dumps(_answer(request["template"], request["variables"])))


if __name__ == "__main__":
    main()
