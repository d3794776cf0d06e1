"""Names of the 1000 ImageNet classes, which the official weights know by number.

`pip download --no-deps timm==1.0.31 && python -m var_jax.data.imagenet timm-*.whl` rebuilds the
list: the first word for each wnid, in the order of wnids.
"""

import sys
import zipfile
from pathlib import Path

FILE = Path(__file__).parents[1] / "assets" / "imagenet_classes.txt"
SAME_WORD = {  # first words that two classes share
    "n02012849": "crane (bird)",
    "n02113186": "Cardigan Welsh corgi",
    "n03126707": "crane (machine)",
    "n03710721": "tank suit",
}


def class_names(count: int) -> tuple[str, ...]:
    """A name for each class 0..count-1: ImageNet's, in wnid order, for 1000; else its number."""
    if count != 1000:
        return tuple(map(str, range(count)))
    return tuple(FILE.read_text().splitlines())


def build(wheel: str) -> None:
    """Writes the list from the synsets in timm's wheel."""
    with zipfile.ZipFile(wheel) as archive:
        read = lambda name: archive.read(f"timm/data/_info/imagenet_{name}.txt").decode()
        words = dict(line.split("\t") for line in read("synset_to_lemma").splitlines())
        wnids = read("synsets").split()
    names = [SAME_WORD.get(wnid, words[wnid].split(",")[0]) for wnid in sorted(wnids)]
    assert len({name.lower() for name in names}) == 1000
    FILE.write_text("\n".join(names) + "\n")


if __name__ == "__main__":
    build(sys.argv[1])
