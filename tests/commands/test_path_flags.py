"""Every flag and config field that takes a path reads it alike."""

import subprocess
import sys

import numpy as np
import pytest
from running import ROOT, TINY, complaint

from var_jax.tools.images import save_png

PNG = ROOT / "benchmarks" / "emoji" / "edit.png"


@pytest.mark.parametrize(
    "command, flags, name",
    [
        ("train", "--config emoji --workdir", "--workdir"),
        ("train", "--config emoji --config.data.source", "data.source"),
        ("train", "--config emoji --config.pretrained_tokenizer", ""),
        ("train", "--config", "--config"),
        ("sample", "--num 1 --checkpoint", ""),
        ("sample", "--num 1 --checkpoint emoji --out", "--out"),
        ("edit", "--checkpoint emoji --box 0,0,1,1 --image", "--image"),
        ("encode", "--checkpoint emoji --images emoji --out", "--out"),
        ("encode", "--checkpoint emoji --images", "data.source"),
        ("encode", "--images emoji --checkpoint", ""),
        ("convert", "--out o --tokenizer", ""),
        ("convert", "--tokenizer t.pth --out", "--out"),
        ("convert", "--to_torch o --checkpoint", ""),
        ("convert", "--checkpoint emoji --to_torch", "--to_torch"),
        ("prepare", "--out o --source", "data.source"),
        ("scaling", "--runs", "--runs"),
        ("scaling", "--runs r --out", "--out"),
    ],
)
@pytest.mark.parametrize("text", [" ", "~nobody-of-this-name/x", "s3://bucket/x"])
def test_every_flag(command, flags, name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *flags, last = flags.split()
    given = [last, text] if text.startswith("~") else [f"{last}={text}"]
    err = complaint(command, *flags, *given)
    assert err.startswith(f"error: {name}=" if name else "error: "), err
    assert not list(tmp_path.iterdir())


def test_both_forms_of_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for flag in ("--checkpoint=~/x", "--checkpoint ~/x", "--checkpoint=file://~/x"):
        err = complaint("sample", "--num", "1", *flag.split())
        assert f"{tmp_path}/x is not a checkpoint" in err or "file://~" in err


@pytest.mark.parametrize("kind", ["file", "under a file", "named as a file"])
@pytest.mark.parametrize(
    "command, flags, name",
    [
        ("train", "--config emoji", "--workdir"),
        ("sample", "--checkpoint emoji --num 1", "--out"),
        ("edit", "--checkpoint emoji --box 0,0,1,1 --image {image}", "--out"),
        ("encode", "--checkpoint emoji --images emoji", "--out"),
        ("prepare", "--source {image}/..", "--out"),
        ("scaling", "--runs {image}", "--out"),
        ("convert", "--tokenizer {image}", "--out"),
        ("convert", "--checkpoint emoji", "--to_torch"),
    ],
)
def test_a_folder_to_write_to_is_none(command, flags, name, kind, tmp_path):
    image, out = tmp_path / "i.png", tmp_path / "samples.npz"
    save_png(image, np.zeros((8, 8, 3), np.uint8))
    if kind != "named as a file":
        out.touch()
    if kind == "under a file":
        out = out / "folder"
    err = complaint(command, *flags.format(image=image).split(), name, out)
    assert f"error: {name}={out}" in err, err


LOCKED = """
import sys
from var_jax.tools.files import output_folder
output_folder(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


def test_one_folder_has_one_writer_by_any_name(tmp_path):
    folder, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(folder)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", LOCKED, folder], **pipes) as other:
        other.stdout.readline()
        for command, *flags in (
            ("train", "--config", TINY, "--workdir"),
            ("sample", "--checkpoint", "emoji", "--num", 1, "--out"),
            ("edit", "--checkpoint=emoji", "--box=0,0,1,1", "--image", PNG, "--out"),
            ("encode", "--checkpoint", "emoji", "--images", "emoji", "--out"),
            ("prepare", "--source", PNG.parents[1], "--out"),
            ("convert", "--tokenizer", PNG, "--out"),
            ("convert", "--checkpoint", "emoji", "--to_torch"),
        ):
            for name in (folder, link):
                assert "at work in" in complaint(command, *flags, name), command
        other.kill()
    assert "no file of weights" in complaint("convert", "--tokenizer", PNG, "--out", link)
    assert not list(folder.iterdir())  # the folder was there before, so it stays
    assert "no file of weights" in complaint("convert", "--tokenizer", PNG, "--out", link / "new")
    assert not list(folder.iterdir())
