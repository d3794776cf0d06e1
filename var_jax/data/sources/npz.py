"""Images and labels in one .npz file."""

import numpy as np
from etils import epath

from var_jax import BadInput
from var_jax.data.sources.base import ArraySource, split_indices
from var_jax.tools.npz import reading


def open_npz(path: str, split: str, size: int, resize: float) -> ArraySource:
    """Images of an .npz: `arr_0` uint8 (N,H,W,3), `labels` (N,), perhaps `class_names` (C,).

    Every tenth image of a class is held out.

    Raises: BadInput if the file is no such .npz.
    """
    with reading(path), epath.Path(path).expanduser().open("rb") as file, np.load(file) as arrays:
        if not {"arr_0", "labels"} <= {*arrays}:
            raise BadInput(f"{path} holds {', '.join(arrays)}; expected arr_0 and labels.")
        images, labels = arrays["arr_0"], arrays["labels"]
        names = arrays.get("class_names")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise BadInput(
            f"{path}: arr_0 is {images.dtype} of shape {images.shape}; expected uint8 (N,H,W,3)."
        )
    fits = np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(images),)
    if not fits or not len(labels):
        raise BadInput(f"{path}: labels is {labels.dtype} of shape {labels.shape}; expected (N,).")
    if labels.min() < 0:
        raise BadInput(f"{path}: labels holds {labels.min()}; expected numbers from 0.")
    count = int(labels.max()) + 1
    class_names = tuple(map(str, range(count) if names is None else np.atleast_1d(names)))
    if len(set(class_names)) < len(class_names):
        raise BadInput(f"{path}: class_names holds one name twice.")
    if count > len(class_names):
        raise BadInput(f"{path} has label {count - 1}, but {len(class_names)} class_names.")
    chosen = split_indices(class_names, [str(i) for i in range(len(labels))], labels, split)
    return ArraySource(images[chosen], labels[chosen].astype(np.int32), class_names, size, resize)
