"""What users' own modules and functions do wrong is told in one sentence."""

import numpy as np
import pytest

from var_jax import BadInput
from var_jax.sample import of_user
from var_jax.tools.plugins import find_function


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            "raise RuntimeError('no\\nway')",
            r"--scorer=bad_module:f cannot be imported: R.*: no way",
        ),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("import nothing_of_this_name", "is no MODULE:FUNCTION here"),
    ],
)
def test_modules(tmp_path, monkeypatch, text, sentence):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bad_module.py").write_text(text)
    with pytest.raises(BadInput, match=sentence):
        find_function("--scorer", "bad_module:f", 2)


def failing(images, labels):
    raise KeyError("a")


@pytest.mark.parametrize(
    "score, sentence",
    [
        (failing, "--scorer=a:b failed with KeyError: 'a'"),
        (lambda images, labels: "good", "no kind of real numbers"),
        (lambda images, labels: object(), "TypeError"),
        (lambda images, labels: np.zeros(2, complex), "complex128 is no kind of real numbers"),
    ],
)
def test_scorers(score, sentence):
    with pytest.raises(BadInput, match=sentence):
        of_user(score, "a:b")(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int32), None)
