"""What finished trainings of a transformer left, as points for scaling laws: a row a validation."""

import csv
import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from var_jax import BadInput
from var_jax.checkpoints.export import is_export
from var_jax.config import (
    Config,
    TokenizerConfig,
    TransformerConfig,
    bound_value,
    from_dict,
    settings,
)
from var_jax.data.records import sound
from var_jax.sampling.exports import build
from var_jax.schedule import shape_of
from var_jax.tools.files import read_json, replacing
from var_jax.tools.flops import matmul_flops, training_totals
from var_jax.tools.logs import read_metrics
from var_jax.tools.paths import user_path
from var_jax.tools.trees import path_name
from var_jax.training.workdir import RECORDED, flat

Row = dict[str, Any]  # COLUMNS, and loss and error of each scale

TEXT = ("run", "recipe", "variant")
COUNTS = (
    "depth", "width", "seed", "steps", "step", "images", "tokens",
    "parameters", "head_parameters", "embedding_parameters", "tokenizer_parameters",
)  # fmt: skip
NUMBERS = (
    "learning_rate", "compute", "attention_flops", "head_flops", "blocks_flops", "tokenizer_flops",
    "loss_all", "loss_last", "error_all", "error_last",
)  # fmt: skip
COLUMNS = (*TEXT, *COUNTS, *NUMBERS)
ABOVE_0 = ("step", "images", "parameters", "compute", *NUMBERS[-4:])
LEAST, MOST = 1e-30, 1e30  # of what is above 0
# What sizes of one ladder may differ in. All else must be the same, or a law would mix causes.
VARIES = {
    "seed", "transformer.depth", "transformer.width", "transformer.num_heads",
    "transformer.drop_path", "transformer.gamma_std", "train_transformer.steps",
    "train_transformer.learning_rate", "train_transformer.warmup_steps",
}  # fmt: skip


def read_rows(paths: Sequence[str]) -> list[Row]:
    """The validations of runs, each once: of work directories, folders of them, and runs.csv.

    Unfinished runs are told on stderr and left out. Raises: BadInput, naming the path, where there
    is no run, or runs are of different data, tokenizers or recipes.
    """
    rows, recipes = [], {}
    for text in paths:
        path = user_path(text, "--runs")
        if path.is_file():
            rows += read_csv(path)
            continue
        for folder in work_directories(path):
            config, about = read_config(folder)
            if found := read_run(folder, config, about):
                recipes[found[0]["recipe"]] = folder, about
                rows += found
    if not rows:
        raise BadInput(f"--runs={','.join(paths)}: no finished training of a transformer is there.")
    check_alike(rows, recipes)
    return list({(row["run"], row["step"]): row for row in rows}.values())


def work_directories(path: epath.Path) -> list[epath.Path]:
    """The folder itself, or those in it that are work directories. Raises: BadInput for none."""
    inside = sorted(path.iterdir()) if path.is_dir() else []
    folders = [
        folder
        for folder in (path, *inside)
        if (folder / "config.json").exists() and not is_export(folder)
    ]
    if not folders:
        raise BadInput(
            f"--runs={path}: expected a work directory of var_jax.train (it holds config.json), a"
            " folder of them, or runs.csv."
        )
    return folders[:1] if folders[0] == path else folders


def read_config(folder: epath.Path) -> tuple[Config, dict[str, Any]]:
    """The config of a run, and what of it and of its data a ladder must share."""
    fields = read_json(folder / "config.json")
    inputs = {name: fields.pop(name) for name in RECORDED if name in fields}
    try:
        config = from_dict(Config, fields)
    except BadInput as error:
        raise BadInput(f"{folder / 'config.json'}: {error}") from None
    names = flat(json.loads(json.dumps(settings(config))))
    about = {name: bound_value(name, value) for name, value in names.items() if name not in VARIES}
    about["fingerprint of the tokenizer"] = inputs.get("fingerprint", "")
    data = folder / "data.json"
    with sound(data, "put it back, or leave the run out"):
        about["images"] = json.loads(data.read_text())[-1] if data.exists() else None
    return config, about


def read_run(folder: epath.Path, config: Config, about: dict[str, Any]) -> list[Row]:
    """The rows of a run; none of one that is not finished or trained no transformer."""
    training, records = config.train_transformer, read_metrics(folder)
    found = [r for r in records if r["stage"] == "transformer" and "val_loss" in r]
    if not training.steps:
        return []
    if not (folder / "summary.json").exists() or (found and found[-1]["step"] < training.steps):
        steps_done = max((r["step"] for r in records if r["stage"] == "transformer"), default=0)
        tell(f"{folder}: left out, unfinished (step {steps_done} of {training.steps})")
        return []
    if not found:
        raise BadInput(f"{folder}: metrics.jsonl holds no validation of the transformer.")
    names = flat(json.loads(json.dumps(settings(config))))
    varied = {name: names[name] for name in VARIES - {"train_transformer.learning_rate"}}
    fixed = {
        "run": str(folder), "recipe": digest(about), "variant": digest(varied),
        "depth": config.transformer.depth, "width": config.transformer.width, "seed": config.seed,
        "learning_rate": training.learning_rate, "steps": training.steps,
        **parameters(config.transformer, config.tokenizer),
    }  # fmt: skip
    rows = []
    for record in found:
        images = record["step"] * training.batch_size
        totals = training_totals(config.transformer, training, record["step"])
        totals["compute"] = sum(count for name, count in totals.items() if name != "tokens")
        totals |= {"images": images, "tokenizer_flops": images * encoding_flops(config.tokenizer)}
        rows.append(fixed | {"step": record["step"]} | totals | figures(record, folder))
    return rows


def digest(fields: dict[str, Any]) -> str:
    """12 hex digits that tell fields from others."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def figures(record: Row, folder: epath.Path) -> Row:
    """Loss and error of a validation: of all scales together, the last, and each of the others."""
    found, where = {}, f"{folder}: the validation at step {record['step']}"
    for name, value in record.items():
        kind, _, scale = name.removeprefix("val_").partition("_")
        if not name.startswith("val_") or kind not in ("loss", "accuracy"):
            continue
        if not isinstance(value, (int, float)):
            raise BadInput(f"{where} has {name}={value!r}; expected a number.")
        if kind == "loss":
            found[f"loss_{scale or 'all'}"] = value
        else:
            found[f"error_{scale or 'all'}"] = 1 - value
    for name in NUMBERS[-4:]:
        if not LEAST < found.get(name, 0) < MOST:
            raise BadInput(f"{where} has {name}={found.get(name)}; a law needs numbers above 0.")
    return found


@functools.cache
def parameters(config: TransformerConfig, tokenizer: TokenizerConfig) -> dict[str, int]:
    """Weights by kind. The laws' N is that of the blocks, as in the paper (18·depth·width²)."""
    counts = {"parameters": 0, "head_parameters": 0, "embedding_parameters": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(build(config)):
        part = path_name(path).split(".")[0].split("_")[0]
        kind = {"blocks": "", "ada": "", "head": "head_"}.get(part, "embedding_")
        counts[f"{kind}parameters"] += leaf.size
    leaves = jax.tree.leaves(build(tokenizer))
    return counts | {"tokenizer_parameters": sum(leaf.size for leaf in leaves)}


@functools.cache
def encoding_flops(config: TokenizerConfig) -> int:
    """Operations of encoding an image; a token cache spends them once for all epochs and runs."""
    tokenizer = build(config)
    image = jax.ShapeDtypeStruct((1, *shape_of(config.image_size), 3), jnp.float32)
    return matmul_flops(type(tokenizer).encode, tokenizer, image)


def check_alike(rows: list[Row], recipes: dict[str, tuple[epath.Path, dict[str, Any]]]) -> None:
    """Raises BadInput if runs are of more than one recipe, naming a field in which two differ."""
    for (one, about), (other, its) in zip(recipes.values(), [*recipes.values()][1:], strict=False):
        name = next(name for name in about | its if about.get(name) != its.get(name))
        show = lambda value: json.dumps(value)[:60]
        raise BadInput(
            f"{one} and {other} differ in {name}: {show(about.get(name))} and"
            f" {show(its.get(name))}; a law needs runs that differ in size alone."
        )
    first = rows[0]
    for row in rows:
        if row["recipe"] != first["recipe"]:
            raise BadInput(
                f"{first['run']} and {row['run']} are of different recipes ({first['recipe']} and"
                f" {row['recipe']}); a law needs runs that differ in size alone."
            )


def read_csv(path: epath.Path) -> list[Row]:
    """The rows of a runs.csv. Raises: BadInput, naming file, line and column."""
    try:
        lines = list(csv.DictReader(path.read_bytes().decode("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is no table: {error}.") from error
    if missing := [name for name in COLUMNS if not lines or name not in lines[0]]:
        raise BadInput(
            f"{path} has no column {missing[0]!r}; expected runs.csv as this command writes it,"
            " with commas."
        )
    rows = []
    for number, line in enumerate(lines, 2):
        row: Row = {}
        of_scales = [n for n in line if n and n.startswith(("loss_scale", "error_scale"))]
        for name in [*COLUMNS, *(name for name in of_scales if line[name])]:
            kind, text = str if name in TEXT else int if name in COUNTS else float, line[name]
            try:
                row[name] = kind(text)
                if kind is not str and not 0 <= row[name] < MOST:
                    raise ValueError(text)
            except (TypeError, ValueError) as error:
                raise BadInput(
                    f"{path}, line {number}: {name}={text!r}; expected a number of at least 0."
                ) from error
        if zero := [name for name in ABOVE_0 if row[name] < LEAST]:
            raise BadInput(
                f"{path}, line {number}: {zero[0]}={row[zero[0]]}; expected more than 0."
            )
        rows.append(row)
    return rows


def write_csv(path: epath.Path, rows: Iterable[Row]) -> None:
    """Writes runs.csv, which `read_rows` takes in place of the runs."""
    rows = list(rows)
    scales = sorted(
        set().union(*rows) - {*COLUMNS}, key=lambda name: (name.split("_")[0], len(name), name)
    )
    with replacing(path) as beside, beside.open("w") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *scales], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def tell(sentence: str) -> None:
    """Prints on stderr."""
    print(sentence, file=sys.stderr, flush=True)
