"""Builds `imagenet_classes.txt` from the synsets that timm lists.

    pip download --no-deps timm==1.0.31
    python -m var_jax.assets.build_imagenet_classes timm-1.0.31-*.whl

A class is named by the first word for its wnid; classes are in the order of wnids.
"""

import sys
import zipfile
from pathlib import Path

SAME_WORD = {  # first words that two classes share
    "n02012849": "crane (bird)",
    "n02113186": "Cardigan Welsh corgi",
    "n03126707": "crane (machine)",
    "n03710721": "tank suit",
}


def build(wheel: str) -> None:
    """Writes the list from timm's wheel."""
    with zipfile.ZipFile(wheel) as archive:
        read = lambda name: archive.read(f"timm/data/_info/imagenet_{name}.txt").decode()
        words = dict(line.split("\t") for line in read("synset_to_lemma").splitlines())
        wnids = read("synsets").split()
    names = [SAME_WORD.get(wnid, words[wnid].split(",")[0]) for wnid in sorted(wnids)]
    assert len({name.lower() for name in names}) == 1000
    Path(__file__).with_name("imagenet_classes.txt").write_text("\n".join(names) + "\n")


if __name__ == "__main__":
    build(sys.argv[1])
