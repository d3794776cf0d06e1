"""Images and labels in one .npz file."""

import numpy as np
from etils import epath

from var_jax import BadInput
from var_jax.data.sources.base import ArraySource, split_indices
from var_jax.tools.npz import DAMAGED


def open_npz(path: str, split: str, size: int, resize: float) -> ArraySource:
    """Images of an .npz: `arr_0` uint8 (N,H,W,3), `labels` (N,), perhaps `class_names` (C,).

    Every tenth image of a class is held out.

    Raises: BadInput if the file is no such .npz.
    """
    try:
        with epath.Path(path).expanduser().open("rb") as file, np.load(file) as arrays:
            images, labels = arrays["arr_0"], arrays["labels"]
            names = arrays.get("class_names")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from error
    except KeyError as error:
        raise BadInput(f"{path} lacks one of two arrays; expected arr_0 and labels.") from error
    except DAMAGED as error:
        raise BadInput(f"{path} is no npz file, or a damaged one.") from error
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
