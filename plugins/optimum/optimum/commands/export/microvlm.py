"""`optimum-cli export microvlm`: the options, checks and messages of `microvlm-export`."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from microvlm.console import run_click
from microvlm.exporters.export_command import command

_NAMED_HERE = ("checkpoint", "output")
_CONTEXT = click.Context(command, info_name="microvlm-export")


def options() -> list[click.Option]:
    """The options of `microvlm-export` that are taken over as they are."""
    return [
        each for each in command.params if isinstance(each, click.Option) and each.name not in _NAMED_HERE
    ]


class MicroVLMExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="microvlm", help="Export a MicroVLM checkpoint to a bundle of ONNX graphs.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = command.help
        parser.add_argument("-m", "--model", required=True, help="A folder, a hub id or a bundled name.")
        parser.add_argument("output", help="Folder to create.")
        for option in options():
            keywords: dict[str, Any] = {"dest": option.name, "help": _help(option)}
            if option.is_flag:
                keywords["action"] = "store_true"
            else:
                keywords["metavar"] = option.make_metavar(_CONTEXT)
            parser.add_argument(*option.opts, **keywords)

    def run(self) -> None:
        assert self.args is not None
        arguments = []
        for option in options():
            value = getattr(self.args, str(option.name))
            if value is True:
                arguments.append(option.opts[-1])
            elif value not in (None, False):
                # One word, so that a value that starts with a hyphen is a value.
                arguments.append(f"{option.opts[-1]}={value}")
        run_click(command, [*arguments, f"--output={self.args.output}", "--", self.args.model])


def _help(option: click.Option) -> str:
    record = option.get_help_record(_CONTEXT)
    # argparse formats help texts with %.
    return record[1].replace("%", "%%") if record else ""
