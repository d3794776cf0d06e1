"""Sets that tensorflow-datasets prepared as array_record; nothing is downloaded."""

import io
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from var_jax import BadInput
from var_jax.data.sources.base import EncodedImages
from var_jax.data.sources.idx import read_split
from var_jax.data.sources.imagenet import WNID, readable


def open_tfds(set_name: str, split: str) -> EncodedImages:
    """One split of NAME[/CONFIG][:VERSION] in $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises: BadInput if the package or the set is missing, or the set has no images and labels.
    """
    tfds = _import_tfds(set_name)
    folder = _prepared_folder(set_name)
    builder: Any = tfds.builder_from_directory(folder)
    if builder.info.file_format.value != "array_record":
        raise BadInput(
            f"{folder} was prepared as {builder.info.file_format.value}, which only TensorFlow"
            f" reads; expected array_record: {_prepare_command(set_name)}."
        )
    features, kinds = builder.info.features, (tfds.features.Image, tfds.features.ClassLabel)
    found = [[n for n, f in features.items() if isinstance(f, kind)] for kind in kinds]
    if not all(found):
        raise BadInput(
            f"tfds:{set_name} has the features {', '.join(features)}: no image or no class."
        )
    image, label = found[0][0], found[1][0]
    known = builder.info.splits
    parts = {"train": "train", "validation": next(filter(known.get, ("validation", "test")), "")}
    if not parts["validation"]:
        parts = {"train": "train[:95%]", "validation": "train[95%:]"}
    decoders = {image: tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split=parts[split], decoders=decoders)
    names = features[label].names
    order = np.arange(len(names))
    if all(WNID.fullmatch(n) for n in names):  # some sets number ImageNet's classes differently
        names, order = sorted(names), np.argsort(np.argsort(names))

    def read(index: int) -> tuple[bytes, int, str]:
        item = source[index]
        if not 0 <= (number := int(item[label])) < len(order):
            raise BadInput(f"tfds:{set_name} has an image without a label, record {index}.")
        name = item.get("file_name", f"record {index}")
        name = name.decode() if isinstance(name, bytes) else str(name)
        return item[image], int(order[number]), name

    return EncodedImages(len(source), read, readable(names))


def prepare_idx(set_name: str, directory: str, root: str) -> None:
    """Writes the four IDX files of a folder as a set that `tfds:set_name` reads, into `root`.

    Like the `mnist` and `fashion_mnist` of tfds it has the splits train and test, of grey PNGs and
    labels. Their own `tfds build` takes TensorFlow and a download, this neither.

    Raises: BadInput if the package is missing, or the files are, or are damaged.
    """
    tfds = _import_tfds(set_name)
    splits = {"train": read_split(directory, "train"), "test": read_split(directory, "validation")}
    images, _, names = splits["train"]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore
        VERSION = tfds.core.Version("1.0.0")
        name = set_name

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(*images.shape[1:], 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=names),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, (image, label) in enumerate(zip(*splits[split][:2], strict=True)):
                yield i, {"image": as_png(image), "label": int(label)}

    Builder(data_dir=root, file_format="array_record").download_and_prepare()


def as_png(image: UInt8[np.ndarray, "H W"]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def _import_tfds(set_name: str) -> Any:
    try:
        import tensorflow_datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        sentence = f"data source 'tfds:{set_name}' needs tfds: pip install 'var_jax[data]'."
        raise BadInput(sentence) from error
    return tensorflow_datasets


def _prepared_folder(name: str) -> epath.Path:
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
        f"tfds:{name} is not prepared in {root}; prepare it with: {_prepare_command(name)}."
    )


def _prepare_command(name: str) -> str:
    return f"tfds build {name} --file_format=array_record"
