"""What a label means, and that what may mean two things is refused with both."""

import numpy as np
import pytest

from var_jax import BadInput
from var_jax.data.classes import class_index

FOLDERS = ("1", "10", "2", "3")  # in their order as text
ANIMALS = ("Cat", "cat", "Dog", "straße", "Z\u00fcrich", "emu:2")
PADDED = ("01", "02", "03")
YEARS = ("2023", "2024")
DIGITS = tuple("0123456789")


@pytest.mark.parametrize(
    ("names", "label", "index"),
    [
        (FOLDERS, 1, 1), (FOLDERS, np.int64(3), 3), (FOLDERS, "10", 1), (FOLDERS, "2", 2),
        (FOLDERS, "0", 0), (FOLDERS, "name=1", 0), (FOLDERS, "number=1", 1), (FOLDERS, "name=3", 3),
        (ANIMALS, "cat", 1), (ANIMALS, "Cat", 0), (ANIMALS, "DOG", 2), (ANIMALS, np.str_("dog"), 2),
        (ANIMALS, " dog ", 2), (ANIMALS, "STRASSE", 3), (ANIMALS, "Zu\u0308rich", 4),
        (ANIMALS, "emu:2", 5), (ANIMALS, "2", 2), (ANIMALS, "+2", 2), (PADDED, "03", 2),
        (PADDED, "3", 2), (PADDED, "0", 0), (YEARS, "2024", 1), (YEARS, "1", 1), (DIGITS, "7", 7),
        (("name=1", "1"), "name=1", 0),
    ],
)  # fmt: skip
def test_meaning(names, label, index):
    assert class_index(names, label) == index


@pytest.mark.parametrize(
    ("names", "label", "sentence"),
    [
        (
            FOLDERS,
            "1",
            r"'1', which may mean the class '1' \(say name=1\) or class number 1, '10' ",
        ),
        (PADDED, "1", r"the class '01' \(say name=01\) or class number 1, '02' \(say number=1\)"),
        (ANIMALS, "CAT", r"the class 'Cat' \(say name=Cat\) or the class 'cat' \(say name=cat\)"),
        (("crane", "owl", "crane"), "crane", r"\(say number=0\) or class number 2, 'crane'"),
        (FOLDERS, "4", "label holds 4; classes are 0 to 3"),
        (FOLDERS, "-1", "label holds -1; classes are 0 to 3"),
        (FOLDERS, -1, "label holds -1; classes are 0 to 3"),
        (FOLDERS, "number=9", "holds number=9; classes are 0 to 3"),
        (FOLDERS, "9" * 5000, "classes are 0 to 3"),
        (ANIMALS, "name=2", "holds 'name=2'; the classes of this checkpoint are Cat"),
        (ANIMALS, "", "holds ''; the classes"),
        (ANIMALS, "²", "holds '²'; the classes"),
        (ANIMALS, True, "holds True; expected a class name or number"),
        (ANIMALS, 1.0, "holds 1.0; expected a class name or number"),
        (ANIMALS, None, "holds None; expected"),
        (ANIMALS, b"cat", "holds b'cat'; expected"),
    ],
)
def test_refused(names, label, sentence):
    with pytest.raises(BadInput, match=sentence):
        class_index(names, label)


def test_a_number_too_large_to_be_written_is_refused():  # no parameter: pytest would write it
    for label in (10**5000, -(10**5000)):
        with pytest.raises(BadInput, match=r"a number beyond 10\^9; classes are 0 to 3"):
            class_index(FOLDERS, label)
