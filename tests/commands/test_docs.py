"""What README and the documentation say is so: commands, fields, messages, the lock file."""

import ast
import contextlib
import dataclasses
import importlib
import io
import re
import runpy
import shlex
import struct
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import setuptools
from packaging.requirements import Requirement
from PIL import Image
from running import ROOT, run, run_alone

from var_jax import config
from var_jax.checkpoints.torch.convert import write_models
from var_jax.data.sources import open_source
from var_jax.sampling.exports import build
from var_jax.tools import cli
from var_jax.tools.configs import load_config

sys.path.insert(0, str(ROOT / "docs"))
import from_code

FOR_USERS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [
    ROOT / "CONTRIBUTING.md", ROOT / "launch/README.md", *sorted(ROOT.glob("benchmarks/*.md")),
    *sorted(ROOT.glob("var_jax/*.py")), *sorted(ROOT.glob("configs/*.py")),
]  # fmt: skip
OURS = (
    r"(?:[A-Z_]+=\S* )*"
    r"(?:python -m (?:var_jax|benchmarks)\.[a-z]+|python [a-z]\S*\.py|pip install|var_jax"
    r"|launch/\w+\.sh)"
)


def commands_in(path):
    """The commands of this repository in code blocks, tables and sentences; of a line with && each.

    In a sentence those that have a flag or name an extra.
    """
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    joined = re.sub(r"\\+\n\s*", "", text)
    lines = re.findall(rf"^(?: {{4}}|)({OURS}(?: .*)?)$", joined, re.M)
    lines += re.findall(rf"(?<!`)`({OURS}\s[^`]*(?:--|\[)[^`]*)`", joined)
    for line in lines:
        plain = re.sub(r"\[--[^]]*\]| +# .*", "", line)  # of a docstring's synopsis
        parts = (" ".join(part.split()) for part in plain.split("&&"))
        yield from (part for part in parts if re.search(OURS, part))


def commands_of(paths):
    """The commands of some files, each once."""
    return list(dict.fromkeys(command for path in paths for command in commands_in(path)))


def accepts(name, argv):
    """Asserts that a command takes these flags, and that its config is there."""
    argv = [word.replace("gs://", "").replace("$CONFIG", "imagenet:d16") for word in argv]
    argv = [re.sub(r"^(finetune\w*):.*", r"\1:emoji", word) for word in argv]
    read = lambda args: load_config(args.config, args.config_field) if "config" in args else None
    module = importlib.import_module(f"var_jax.{name}")
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.call(read, module.define_flags, argv)
    assert code == 0, err.getvalue()


def setup_arguments():
    """What setup.py hands to setuptools."""
    with pytest.MonkeyPatch.context() as patch:
        kept = {}
        patch.setattr(setuptools, "setup", lambda **arguments: kept.update(arguments))
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    return kept


def python_blocks():
    """The Python of README and the documentation."""
    for path in FOR_USERS:
        text = path.read_text()
        for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
            yield pytest.param(block, id=path.name)
        for block in re.findall(r"^    import var_jax\n(?:    .*\n)+", text, re.M):
            yield pytest.param(textwrap.dedent(block), id=path.name)


@pytest.mark.slow
@pytest.mark.parametrize("block", [*python_blocks()])
def test_python_runs(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(block, {})


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_commands_are_found():
    assert "python -m var_jax.train --config emoji" in commands_of(FOR_USERS)
    assert len(commands_of(FOR_USERS)) > 30


@pytest.mark.parametrize("command", commands_of([*FOR_USERS, *OTHERS]))
def test_a_command_has_these_flags(command):
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    program, rest = words[0], words[1:]
    if program == "pip":
        extras = re.findall(r"[\w]+", "".join(re.findall(r"\[.*?\]", command)))
        assert {*extras} <= {*setup_arguments()["extras_require"]}
    elif program == "python" and rest[1:] and rest[1].startswith("var_jax."):
        accepts(rest[1].removeprefix("var_jax."), rest[2:])
    elif program == "var_jax":
        accepts(rest[0], rest[1:])
    elif program == "python":
        name, *rest = rest if rest[0] != "-m" else [f"{rest[1].replace('.', '/')}.py", *rest[2:]]
        defined = re.findall(
            r"""(?:DEFINE_\w+\(|add_argument\()\s*"(?:--)?(\w+)""", (ROOT / name).read_text()
        )
        assert {word[2:].partition("=")[0] for word in rest if word[:2] == "--"} <= {*defined}
    else:
        assert (ROOT / program).is_file()
        if rest and not rest[0].startswith("-"):
            accepts(rest[0], rest[1:])
        elif rest:
            accepts("train", ["--config", "emoji", *rest])


# Of these the flags are checked and no more. They need what is not here (pip, a cloud, the compiler
# of TPUs, torch, photographs, the release's weights, ImageNet), serve until Ctrl-C, read what no
# command leaves, or take hours even with few steps; most have tests of their own.
NOT_HERE = (
    r"^pip |gs://|\.aot|--reference VAR|--dinov2|photographs|hub:|imagenet:|VIRTUAL|\.demo"
    r"|runs/small|ladder|versus|storm|benchmarks\.finetune"
)
FEW = {  # of what takes long; of flags that are given twice the last counts
    "train": ["--config.report="],
    "evaluate": ["--num=20"],
    "benchmarks/decoding.py": ["--num=64", "--only=temperature"],
}
FASHION = "idx:/usr/share/datasets/fashion-mnist"


def shortened(command):
    """The words of a command, so that it ends soon."""
    words = shlex.split(command.replace(FASHION, "idx:fashion"))
    program = words[words.index("python") + 1]
    name = words[words.index("-m") + 1].removeprefix("var_jax.") if program == "-m" else program
    words += FEW.get(name, []) if name != "evaluate" or "--num" in words else []
    if name == "train":
        kept = r"finetune:|data\.tokens|train_tokenizer\.steps=0"  # the tokenizer
        words += ["--config.train_tokenizer.steps=2"] * (not re.search(kept, command))
        kept = r"finetune_tokenizer:|train_transformer\.steps=0"  # the transformer
        words += ["--config.train_transformer.steps=2"] * (not re.search(kept, command))
        if "gan.start" in command:
            words += [f"--config.train_tokenizer.gan.{name}=1" for name in ("start", "ramp")]
        if re.search("--config (fashion|baselines:)", command):
            words += ["--config.data.source=idx:fashion"]
    return words


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the commands read: images, and small weights of official shapes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    emoji = open_source("emoji", "train", 32)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(emoji[i]["image"]).save(tmp_path / "pets" / name / f"{i}.png")
    (tmp_path / "DIR").symlink_to(tmp_path / "pets")
    Image.new("RGB", (300, 260), "teal").save(tmp_path / "photo.jpg")
    sizes = {"vocab_size": 64, "latent_dim": 8}
    models = {
        "tokenizer": build(config.TokenizerConfig(channels=32, **sizes)),
        "transformer": build(config.TransformerConfig(depth=1, width=64, num_heads=1, **sizes)),
    }
    rng = np.random.default_rng(0)
    (tmp_path / "fashion").mkdir()
    for split, count in (("train", 200), ("t10k", 100)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        for kind, array in (("images", images), ("labels", np.arange(count, dtype=np.uint8) % 10)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            path = tmp_path / "fashion" / f"{split}-{kind}-idx{array.ndim}-ubyte"
            path.write_bytes(header + array.tobytes())
    models = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), models)
    (tmp_path / "official").mkdir()
    written, _ = write_models(models, {}, tmp_path / "official")
    written["tokenizer"].rename(tmp_path / "official/vae_ch160v4096z32.pth")
    written["transformer"].rename(tmp_path / "official/var_d16.pth")
    return tmp_path


@pytest.mark.slow
def test_commands_for_users_run(workplace):
    commands = [c for c in commands_of(FOR_USERS) if not re.search(NOT_HERE, c)]
    first = [r"convert --tokenizer", r"train --config emoji(?!.*data\.tokens)"]  # others read these
    commands.sort(key=lambda c: [bool(re.search(start, c)) for start in first], reverse=True)
    failed = {}  # all of them, as the whole takes long
    for command in ["python -m var_jax.train --config fashion", *commands]:
        words = shortened(command)
        devices = int(words.pop(0).partition("=")[2]) if "=" in words[0] else 1
        if words[1] == "-m":
            name, flags = words[2].removeprefix("var_jax."), words[3:]
            code, _, err = (
                run(name, *flags) if devices == 1 else run_alone(name, *flags, devices=devices)
            )
        else:
            done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
            code, err = done.returncode, done.stderr
        if code:
            failed[command] = err
    assert not failed


@pytest.mark.slow
def test_figures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs/figures.py"), run_name="__main__")
    used = re.findall(r"\(images/(\w+\.png)\)", (ROOT / "docs/concepts.md").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {*used}


def fields(cls, name=""):
    """The names of all fields, as flags have them."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from fields(type(field.default), f"{name}{field.name}.")
        else:
            yield f"{name}{field.name}"


def test_every_field_is_in_the_reference():
    shared = {f"transformer.{name}" for name in config.SHARED}
    rows = re.findall(r"^\| `(.*?)` \| `(.*?)` \| (.*?) \|", from_code.config_page(), re.M)
    assert {name for name, *_ in rows} == {*fields(config.Config)} - shared
    assert not [name for name, _, meaning in rows if not meaning.strip()]


def test_every_flag_is_in_the_reference():
    page = from_code.commands_page()
    for name in from_code.commands():
        assert f"\n## {name}\n" in page
        assert all(f"| `--{flag}` |" in page for flag in from_code.flags_of(name))


def literals():
    """All texts of the package, those of an f-string with … for what is filled in."""
    part = lambda node: node.value if isinstance(node, ast.Constant) else "…"
    for path in (ROOT / "var_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part(value)) for value in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_our_messages():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^### `+ ?(.*?)`+$", text, re.M)
    assert len(quoted) > 40
    all_texts = "\n".join(literals())
    for message in quoted:
        for words in filter(None, (part.strip(" ;.:(") for part in message.split("…"))):
            assert words in all_texts, message


def test_the_lock_file_satisfies_setup():
    text = (ROOT / "requirements.lock").read_text()
    pins = [Requirement(line) for line in text.splitlines() if "==" in line]
    setup, extras = setup_arguments(), re.findall(r"--extra (\w+)", text)
    wanted = [*setup["install_requires"], *(r for e in extras for r in setup["extras_require"][e])]
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    for requirement in map(Requirement, wanted):
        versions = [pin for pin in pins if pin.name == normal(requirement.name)]
        assert versions, f"{requirement} is not in requirements.lock; see its first lines"
        for pin in versions:
            assert requirement.specifier.contains(next(iter(pin.specifier)).version), pin
