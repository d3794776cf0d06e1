"""Commands end in one sentence and the right exit code, in a real process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = '''
"""A command for the tests."""
from absl import flags
from ml_collections import config_flags

from var_jax import BadInput
from var_jax.tools import cli

NUMBER = flags.DEFINE_integer("number", None, "how many", required=True)
FAIL = flags.DEFINE_string("fail", "", "how to fail")
CONFIG = config_flags.DEFINE_config_file("config")


def main(argv):
    if FAIL.value == "bad":
        raise BadInput("--number is 3; expected 4")
    if FAIL.value == "full":
        try:
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write '/runs/a/7.orbax-checkpoint-tmp/d': No space left on device")
        except ValueError as error:
            raise RuntimeError("background save failed") from error
    if FAIL.value == "interrupt":
        raise KeyboardInterrupt
    if FAIL.value == "bug":
        raise ValueError("a bug")
    print("ran", NUMBER.value, CONFIG.value and CONFIG.value.model.depth)


if __name__ == "__main__":
    cli.run(main)
'''  # noqa: E501

CONFIG = """
from ml_collections import ConfigDict

from var_jax import BadInput


def get_config(size="d16"):
    if size == "word":
        config = ConfigDict({"depth": 16})
        config.depth = "a. b"
    if size == "section":
        config = ConfigDict({"model": {"depth": 16}})
        config.model = "a"
    if size == "bug":
        raise TypeError("a bug in the config")
    if size != "d16":
        raise BadInput(f"size {size!r} is unknown; expected d16")
    return ConfigDict({"model": {"depth": 16}})
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "command.py").write_text(SCRIPT)
    (folder / "conf.py").write_text(CONFIG)

    def call(*flags):
        argv = [sys.executable, "command.py", *flags]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=60)

    return call


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "flag --number is missing; expected a value"),
        (["--number=x"], "flag --number=x: expected a whole number, not 'x'"),
        (["--number=1", "--fial=bad"], "Unknown command line flag 'fial'; did you mean fail?"),
        (["--number=1", "--config=no.py"], "the config file cannot be read: No such .*'no.py'"),
        (["--number=1", "--config=conf.py:d7"], "size 'd7' is unknown; expected d16"),
        (["--number=1", "--config=~/no.py"], f"the config file cannot .*'{Path.home()}/no.py'"),
        (
            ["--number=1", "--config=conf.py", "--config.model.dpth=3"],
            "--config has no field 'dpth'; did you mean 'depth'?",
        ),
        (["--number=1", "--config=conf.py", "--config.model.depth=x"], ".*model.depth=x: .*"),
        (
            ["--number=1", "--config=conf.py:word"],
            "--config: depth=a. b is of type str; expected int",
        ),
        (
            ["--number=1", "--config=conf.py:section"],
            "--config: model=a is of type str; expected ConfigDict",
        ),
        (["--number=1", "--fail=bad"], "--number is 3; expected 4"),
        (["--number=1", "--fail=full"], "the disk holding /runs/a is full; .*"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(command, flags, sentence):
    done = command(*flags)
    assert done.returncode == 2
    assert done.stdout == ""
    pattern = sentence if ".*" in sentence else re.escape(sentence)
    assert re.fullmatch(f"error: {pattern}\n", done.stderr), done.stderr


def test_a_good_command_runs_and_prints_nothing_else(command):
    done = command("--number=1", "--config=conf.py", "--config.model.depth=20")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran 1 20\n", "")


def test_help(command):
    done = command("--help")
    assert done.returncode == 0
    assert "A command for the tests." in done.stdout and "how many" in done.stdout


def test_an_interrupt(command):
    done = command("--number=1", "--fail=interrupt")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("flags", [["--fail=bug"], ["--config=conf.py:bug"]])
def test_a_bug_keeps_its_traceback(command, flags):
    done = command("--number=1", *flags)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "a bug" in done.stderr
