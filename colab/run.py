"""Executes the notebooks from their scripts, in a copy of the repository.

    pip install -e '.[notebooks]'
    python colab/run.py [NAME ...]           # NAME.py -> NAME.ipynb, with outputs
    python colab/run.py --small [NAME ...]   # few steps; nothing is kept

On the CPU unless JAX_PLATFORMS says otherwise. Official weights are downloaded only if
VAR_JAX_MODEL names some, like d16; else --small downloads small files from a server on loopback.
"""

import argparse
import base64
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import jupytext
import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
# The values of form fields (`NAME = value  # @param`) in small settings.
SMALL = {
    "1_quickstart": {"TOKENIZER_STEPS": 20, "TRANSFORMER_STEPS": 10},
    "4_your_own_images": {"TOKENIZER_STEPS": 20, "TRANSFORMER_STEPS": 10, "NUM": 32},
    "5_tpu": {"CONFIG": "emoji", "TOPOLOGY": "v5e:2x2"},
}
# In small settings notebook 3 goes on with the stand-in's files as the hub would serve them.
HUB = """
import sys

sys.path.append("../tests/checkpoints")
from hub_server import Server

released = {"vae_ch160v4096z32.pth": "tokenizer", "var_d16.pth": "transformer"}
files = {name: pathlib.Path(f"official/{part}.pth").read_bytes() for name, part in released.items()}
os.environ |= {"HF_ENDPOINT": Server(files).url, "XDG_CACHE_HOME": os.path.abspath("cache")}
CHECKPOINT = "hub:d16"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join(
        [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # a busy machine makes XLA complain
    os.environ.setdefault("VAR_JAX_MODEL", "stand-in")
    with tempfile.TemporaryDirectory() as work:
        copy_repository(pathlib.Path(work))
        for name in args.names or [path.stem for path in sorted(FOLDER.glob("[0-9]*.py"))]:
            started = time.monotonic()
            notebook = read(FOLDER / f"{name}.py")
            if args.small and name == "3_official_weights":
                stand_in = next(c for c in notebook.cells if c.source.startswith("CHECKPOINT"))
                stand_in.source += HUB
            execute(notebook, f"{work}/colab", SMALL.get(name, {}) if args.small else {})
            if not args.small:
                slim(notebook)
                nbformat.write(notebook, FOLDER / f"{name}.ipynb")
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def copy_repository(work: pathlib.Path) -> None:
    """What git tracks or would; a notebook leaves files beside itself."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=FOLDER.parent, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (source := FOLDER.parent / name).exists():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, work / name)


def read(script: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook of a script, without outputs; the same script gives the same notebook."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({
        "colab": {"provenance": [], "toc_visible": True},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    })  # fmt: skip
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: str, values: dict[str, object]) -> None:
    """Fills in the outputs. Raises: nbclient's CellExecutionError, also if a command fails."""
    sources = [cell.source for cell in notebook.cells]
    for name, value in values.items():
        field = re.compile(rf"^{name} = .*(?=  # @param)", re.MULTILINE)
        assert any(field.search(source) for source in sources), f"there is no field {name}"
        for cell in notebook.cells:
            cell.source = field.sub(f"{name} = {value!r}", cell.source)
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(r"^\s*!", cell.source, re.MULTILINE):
            cell.source += '\nassert not globals().get("_exit_code"), "the command failed"'
    resources = {"metadata": {"path": folder}}
    nbclient.NotebookClient(
        notebook,
        timeout=None,
        startup_timeout=600,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source


def slim(notebook: nbformat.NotebookNode) -> None:
    """Makes the outputs small enough for git: images of at most 80 KB, one format of each."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            found = [data.pop(kind) for kind in ("image/jpeg", "image/png") if kind in data]
            if found:
                data["text/plain"] = "<image>"
                kind, content = compressed(base64.b64decode(found[-1]))
                data[f"image/{kind}"] = base64.b64encode(content).decode()


def compressed(content: bytes, most: int = 80_000) -> tuple[str, bytes]:
    """Format and bytes of an image of at most `most` bytes: PNG, or JPEG where PNG is larger."""
    from PIL import Image  # which no notebook has installed when this file starts

    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB")

    def encoded(image: Any, kind: str, **how: Any) -> bytes:
        image.save(file := io.BytesIO(), kind, **how)
        return file.getvalue()

    kind, made = "png", encoded(image.quantize(256), "png", optimize=True)
    for quality in (90, 80, 70, 50, 30):
        if len(made) <= most:
            break
        kind, made = "jpeg", encoded(image, "jpeg", quality=quality)
    return kind, made


if __name__ == "__main__":
    main()
