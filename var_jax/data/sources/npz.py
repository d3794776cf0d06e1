"""Images and labels in one .npz file."""

import hashlib

import numpy as np
from jaxtyping import Shaped

from var_jax import BadInput
from var_jax.data.sources.base import ArraySource, check_names, split_indices
from var_jax.schedule import Size
from var_jax.tools.npz import check_unpacked_size, reading
from var_jax.tools.paths import user_path


def open_npz(path: str, split: str, size: Size, resize: float) -> ArraySource:
    """Images of an .npz: `arr_0` uint8 (N,H,W,3), `labels` (N,), perhaps `class_names` (C,).

    A tenth is held out, by the contents of the images.

    Raises: BadInput if the file is no such .npz.
    """
    with reading(path), user_path(path, "data.source").open("rb") as file:
        check_unpacked_size(path, file)
        with np.load(file) as arrays:
            if not {"arr_0", "labels"} <= {*arrays}:
                raise BadInput(f"{path} holds {', '.join(arrays)}; expected arr_0 and labels.")
            labels, names = arrays["labels"], arrays.get("class_names")
            images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise BadInput(
            f"{path}: arr_0 is {images.dtype} of shape {images.shape}; expected uint8 (N,H,W,3)."
        )
    fits = np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(images),)
    if not fits:
        raise BadInput(f"{path}: labels is {labels.dtype} of shape {labels.shape}; expected (N,).")
    if labels.min() < 0 or labels.max() >= len(labels):  # then a class would be without an image
        raise BadInput(
            f"{path}: labels holds {labels.min()} to {labels.max()} for {len(labels)} images;"
            " expected numbers of classes, from 0."
        )
    labels, count = labels.astype(np.int32), int(labels.max()) + 1
    class_names = tuple(map(str, range(count))) if names is None else as_names(path, names)
    if count > len(class_names):
        raise BadInput(f"{path} has label {count - 1}, but {len(class_names)} class_names.")
    keys = [hashlib.blake2b(image.tobytes()).digest() for image in images]
    chosen = split_indices(class_names, keys, labels, split)
    return ArraySource(images[chosen], labels[chosen], class_names, size, resize)


def as_names(path: str, names: Shaped[np.ndarray, "..."]) -> tuple[str, ...]:
    """Class names from an array of text, of bytes in UTF-8, or of whole numbers.

    Raises: BadInput for any other array, and for names that are empty or come twice.
    """
    if names.dtype.kind not in "USiu" or names.ndim > 1:
        raise BadInput(
            f"{path}: class_names is {names.dtype} of shape {names.shape}; expected names (C,)."
        )
    found = [
        n.decode(errors="backslashreplace") if isinstance(n, bytes) else str(n)
        for n in np.atleast_1d(names)
    ]
    check_names(found)
    return tuple(found)
