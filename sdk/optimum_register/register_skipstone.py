"""Installed as `optimum.commands.register.register_skipstone`, where `optimum-cli` looks for commands.

A namespace package (PEP 420) of optimum and its plug-ins: this folder never gets an `__init__.py`.
"""

from skipstone.cli import app, run
from skipstone.exporters.optimum_command import optimum_commands

REGISTER_COMMANDS = optimum_commands(app, run)
