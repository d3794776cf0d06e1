"""English names of the ImageNet classes, which the official weights know by number."""

import re
import zlib
from collections.abc import Iterable
from importlib import resources

WNID = re.compile(r"n\d{8}")
ILSVRC_CRC = 105031566  # of the sorted wnids, one a line


def class_names(count: int) -> tuple[str, ...]:
    """A name for each class 0..count-1: ImageNet's, in wnid order, for 1000; else its number."""
    if count != 1000:
        return tuple(map(str, range(count)))
    names = resources.files("var_jax") / "assets" / "imagenet_classes.txt"
    return tuple(names.read_text().splitlines())


def readable(classes: Iterable[str]) -> tuple[str, ...]:
    """The classes' English names if they are the thousand wnids of ILSVRC 2012, else as given."""
    classes = tuple(classes)
    if zlib.crc32("\n".join(classes).encode(errors="surrogateescape")) == ILSVRC_CRC:
        return class_names(len(classes))
    return classes
