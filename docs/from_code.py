"""Pages of the reference that are made from the code: fields of configs, flags of commands."""

import ast
import dataclasses
import importlib
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from var_jax import config
from var_jax.__main__ import commands

# The last column of the table: whether a resumed run may change a field.
MAY_CHANGE = {None: "", config.FREE["binds"]: "yes", config.SET["binds"]: "its path"}
STEPS = {  # of which training/workdir.py says more than metadata can
    "train_tokenizer.steps": "until the transformer's training begins, to no less than are done",
    "train_transformer.steps": "to no less than are done",
}


def field_comments(text: str) -> dict[tuple[str, str], str]:
    """The comment of each field in a module, beside it or above it, by (class, field)."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    alone = {line for line, t in comments.items() if t.line.lstrip().startswith("#")}
    found = {}
    for node in ast.parse(text).body:
        for field in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                lines, above = range(field.lineno, field.end_lineno + 1), field.lineno - 1
                while above in alone:
                    lines, above = range(above, lines.stop), above - 1
                words = [comments[line].string.lstrip("# ") for line in lines if line in comments]
                found[node.name, field.target.id] = " ".join(words)
    return found


def sections(section: Any = config.Config, name: str = "") -> Iterator[tuple[str, type]]:
    """The classes of the configs, each with what flags put before its fields."""
    yield name, section
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.default):
            yield from sections(type(field.default), f"{name}{field.name}.")


def described(cls: type, field: str, comments: dict[tuple[str, str], str]) -> str:
    """What the class, or the one it inherits from, says about a field."""
    return next((c for base in cls.__mro__ if (c := comments.get((base.__name__, field)))), "")


def config_page() -> str:
    """Every field, its default, what it means, and whether a resumed run may change it."""
    comments, parts = {}, []
    for path in Path(config.__file__).parent.glob("*.py"):
        comments |= field_comments(path.read_text())
    for name, cls in sections():
        rows = []
        for field in dataclasses.fields(cls):
            said_once = cls is config.TransformerConfig and field.name in config.SHARED
            if dataclasses.is_dataclass(field.default) or said_once:
                continue
            free = MAY_CHANGE[field.metadata.get("binds", free_of(name))]
            free = STEPS.get(f"{name}{field.name}", free)
            text = described(cls, field.name, comments).replace("|", "\\|")
            default = f"`{field.default!r}`"
            rows.append(f"| `{name}{field.name}` | {default} | {text} | {free} |")
        doc = " ".join((cls.__doc__ or "").split())
        head = "| field | default | meaning | changes on resume |\n|---|---|---|---|\n"
        title = f"`{name.rstrip('.')}`" if name else "The experiment"
        parts.append(f"\n## {title}\n\n{doc}\n\n{head}" + "\n".join(rows) + "\n")
    return "".join(parts)


def free_of(section: str) -> Any:
    """What binds the fields of a section, unless they say so themselves."""
    found = {field.name: field.metadata.get("binds") for field in dataclasses.fields(config.Config)}
    return found.get(section.rstrip("."))


def flags_of(command: str) -> dict[str, flags.Flag]:
    """The flags that a command defines, by name."""
    before = {*flags.FLAGS}
    importlib.import_module(f"var_jax.{command}").define_flags()
    ours = {name: flags.FLAGS[name] for name in flags.FLAGS if name not in before}
    for name in ours:
        delattr(flags.FLAGS, name)
    return ours


def commands_page() -> str:
    """What each command says about itself, and its flags."""
    parts = []
    for command in commands():
        doc = importlib.import_module(f"var_jax.{command}").__doc__
        parts.append(f"\n## {command}\n\n{doc}\n\n| flag | default | |\n|---|---|---|\n")
        for name, flag in flags_of(command).items():
            default = "" if flag.default in (None, []) else f"`{flag.default}`"
            text = " ".join((flag.help or "").split()).replace("|", "\\|")
            parts.append(f"| `--{name}` | {default} | {text} |\n")
    return "".join(parts)


PAGES = {"reference/config": config_page, "reference/commands": commands_page}
