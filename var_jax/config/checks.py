"""What several configs check of their fields, and what a resumed run may change of them."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from var_jax import BadInput
from var_jax.schedule import Schedule, shapes

# What a resumed run may change of a field, once its training has begun: all of it, or all but
# whether it is set. Numbers do not depend on that. Without such metadata it may change nothing.
FREE: dict[str, Callable[[Any], Any]] = {"binds": lambda value: None}
SET: dict[str, Callable[[Any], Any]] = {"binds": bool}

SOME, ANY, SHARE = (1, math.inf), (0, math.inf), (0, 1)  # ranges
PART = (0, math.nextafter(1, 0))

# What no known model comes near; more would take all memory before it fails.
MOST = {
    "depth": 1024, "num_res_blocks": 64, "num_phi": 64, "patch_nums": 512, "batch_size": 2**20,
    "size": 2**14, "patch_size": 2**14, "channel_mults": 1024, "mlp_ratio": 1024, "resize": 64,
    "num_classes": 2**24, "workers": 2**12, "layers": 12,
    **dict.fromkeys(("width", "channels", "latent_dim", "vocab_size"), 2**24),
}  # fmt: skip
MOST_VALUES = 64  # of a field


def check_schedule(patch_nums: Schedule) -> None:
    """Raises BadInput unless the sides start at 1 and never fall; a side may come again.

    A single scale may have any size: that is plain vector quantization, whose tokens have no
    coarser scale to be predicted from.
    """
    pairs = itertools.pairwise(shapes(patch_nums))
    rises = all(h <= H and w <= W for (h, w), (H, W) in pairs)
    begins = patch_nums[:1] == (1,) or (len(patch_nums) == 1 and min(numbers(patch_nums)) > 0)
    if not (begins and rises):
        raise BadInput(
            f"patch_nums={patch_nums} must start at 1 and never fall, like (1, 2, 4, 8) or (1, 2,"
            " (2, 3), (4, 6)), or be a single scale, like (8,)."
        )


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """Raises BadInput unless each named field lies in its range, both ends included.

    And unless all fields are sizes of some model.
    """
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if not all(least <= number <= most for number in numbers(value)):
            wanted = f"at least {least}" if most == math.inf else f"{least} to {most}"
            if most == PART[1]:
                wanted = f"{least} to less than 1"
            raise BadInput(f"{name}={value}; expected {wanted}.")
    for name, most in MOST.items():
        value = getattr(config, name, 0)
        values = value if isinstance(value, tuple) else (value,)
        if max(numbers(value), default=0) > most:
            found = f"{name}={str(value)[:60]}"
            raise BadInput(f"{found} is beyond any model; expected at most {most}.")
        if len(values) > MOST_VALUES:
            raise BadInput(f"{name} has {len(values)} numbers; expected at most {MOST_VALUES}.")


def numbers(value: Any) -> Iterator[Any]:
    """The numbers of a field: of a tuple all that it holds."""
    for part in value if isinstance(value, tuple) else ():
        yield from numbers(part)
    if not isinstance(value, tuple):
        yield value


def check_dtype(name: str, field: str = "dtype") -> None:
    """Raises BadInput unless it names a dtype of activations."""
    if name not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"{field}={name!r} is not one of auto, float32, bfloat16.")
