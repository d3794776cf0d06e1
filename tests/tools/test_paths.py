"""A path is literal, or refused in one sentence."""

import os
from pathlib import Path

import pytest
from etils import epath

from var_jax import BadInput
from var_jax.tools.paths import user_path

HOME = os.path.expanduser("~")
SCHEMES = (
    "s3://b/x",
    "file://",
    "http://h/x",
    "hdfs://h/x",
    "gs://",
    "gs:///x",
    "file://host/x",
    "C:\\x",
)


@pytest.mark.parametrize(
    "text, path",
    [
        *((name, name) for name in ("a", "-x", "lr[1e-3]", "a*b", "a?b", "a%20b#c@d:e", "a b\nc")),
        *((name, name) for name in ("é漢😀", "../a", "a/../b", "/a/b", "a\\b", "a/~", "$A")),
        ("a//b/", "a/b"),
        ("./~x", "~x"),
        ("~", HOME),
        ("~/x y", f"{HOME}/x y"),
        ("~root/x", f"{os.path.expanduser('~root')}/x"),
        ("file:///a/b%20%25c", "/a/b %c"),
        ("file://localhost/a", "/a"),
        ("FILE:///a", "/a"),
        ("GS://bucket/a", "gs://bucket/a"),
        ("gs://bucket/a[1]", "gs://bucket/a[1]"),
    ],
)
def test_what_is_meant(text, path):
    assert str(user_path(text)) == path
    assert user_path(user_path(text)) == user_path(text)
    if "://" not in text and path[0] != "~":
        assert user_path(Path(text)) == user_path(text)


@pytest.mark.parametrize(
    "text, sentence",
    [
        *((text, "expected a local path, file:///PATH or gs://BUCKET/PATH") for text in SCHEMES),
        *((text, "no path is given; expected a local path") for text in ("", " ")),
        ("~nobody-of-this-name/x", "no home folder of that user"),
        ("a" * 300, "too long"),
        ("é" * 130, "too long"),
        ("a/" * 2000, "too long"),
        ("a/" * 1500, "at most 240 bytes, 3800 in all, 256 folders"),
        ("a\0b", "no file can have that name"),
        ("a\udcffb", "no file can have that name"),
        ("gs://", "no bucket is named"),
        ("file://host/x", "files of other hosts are not read"),
        ("/dev/null", "this is no file and no folder"),
    ],
)
def test_what_is_refused(text, sentence):
    with pytest.raises(BadInput) as raised:
        user_path(text, "--out")
    assert str(raised.value).startswith("--out=") and sentence in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


def test_a_folder_is_no_pattern_and_its_owner_needs_no_name(tmp_path, monkeypatch):
    folder = tmp_path / "[a]*?"
    folder.mkdir()
    for name in ("x.txt", "y.txt~"):
        (folder / name).write_text("abc")
    path = epath.Path(folder)
    assert [p.name for p in path.glob("*.txt")] == ["x.txt"]
    assert sorted(p.name for p in path.iterdir()) == ["x.txt", "y.txt~"]

    def nameless(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nameless)
    found = (path / "x.txt").stat()
    assert (found.length, found.is_directory, path.stat().is_directory) == (3, False, True)
