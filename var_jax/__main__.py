"""All commands as one program: `var_jax train` is `python -m var_jax.train`."""

import ast
import runpy
import sys
from pathlib import Path

from var_jax.tools import ending
from var_jax.tools.configs import did_you_mean


def commands() -> dict[str, str]:
    """What each command does, by name; a command is a module of this folder that has flags."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text("utf-8")
        if "\ndef define_flags" in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def main() -> None:
    """Runs the command that comes first, as `python -m` would."""
    name, known = (sys.argv[1:2] or ["--help"])[0], commands()
    if name in ("-h", "--help"):
        print("var_jax COMMAND --flags; COMMAND --help lists the flags. Commands:\n")
        print("\n".join(f"  {name:10s} {does}" for name, does in known.items()))
        return
    if name not in known:
        near = did_you_mean(name, known)
        names = ", ".join(known)
        print(f"error: unknown command {name!r}{near} Commands are {names}.", file=sys.stderr)
        sys.exit(2)
    if not ending.process.starting:
        ending.listen_from_the_start()
    del sys.argv[1]
    runpy.run_module(f"var_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
