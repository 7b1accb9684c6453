"""optimum-cli imports every module of this folder and adds the commands of its REGISTER_COMMANDS."""

from optimum.commands.export.base import ExportCommand
from optimum.commands.export.microvlm import MicroVLMExportCommand

REGISTER_COMMANDS = [(MicroVLMExportCommand, ExportCommand)]
