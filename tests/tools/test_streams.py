"""A closed or broken stream, or a terminal of few characters, ends no command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SPEAKS = """
import sys
from var_jax.tools.streams import keep_streams_open
keep_streams_open()
for _ in range(3):
    print("Zürich 漢")
    print("progress", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    file.write("done")
"""


@pytest.mark.parametrize(
    "how",
    [
        "python | head -c 0",
        "python 2>&1 | head -c 0",
        "python >&-",
        "python 2>&-",
        "python >&- 2>&- <&-",
        "python > /dev/null 2> /dev/null",
        "PYTHONIOENCODING=ascii python",
        "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 python",
    ],
)
def test_a_command_goes_on(tmp_path, how):
    script, done = tmp_path / "speaks.py", tmp_path / "done"
    script.write_text(SPEAKS)
    command = re.sub(r"\bpython\b", f"{sys.executable} {script} {done}", how)
    env = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=env, capture_output=True, text=True
    )
    assert (ran.returncode, done.read_text()) == (0, "done"), ran.stderr
    assert not ran.stderr.replace("progress\n", "")
    if "=" in how:
        assert ran.stdout == "Z\\xfcrich \\u6f22\n" * 3


def test_a_full_disk_is_told_once(tmp_path):
    script = tmp_path / "speaks.py"
    script.write_text(
        SPEAKS.replace("for _", "try:\n    print(1)\nexcept OSError:\n    pass\nfor _")
    )
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, script, tmp_path / "done"], stdout=full, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        )  # fmt: skip
    assert ran.returncode == 0 and ran.stderr == "progress\n" * 3
