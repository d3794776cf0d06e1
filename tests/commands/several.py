"""One command several times in one process: several.py NAME '[["--flag", "value"], ...]'."""

import importlib
import json
import sys

from absl import flags

from var_jax.tools import cli

command, runs = importlib.import_module(f"var_jax.{sys.argv[1]}"), json.loads(sys.argv[2])
for argv in runs:
    sys.argv = [command.__name__, *argv]
    try:
        cli.run(command.main)
    except SystemExit as end:
        print("exit code", end.code, file=sys.stderr)
    for flag in flags.FLAGS:
        flags.FLAGS[flag].unparse()
