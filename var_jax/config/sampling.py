"""How samples and edits are drawn."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from var_jax import BadInput
from var_jax.config.checks import ANY, SHARE, check_ranges
from var_jax.schedule import Schedule

MAX_STEPS = 10_000  # of a solver
MAX_CFG = 1000.0  # far beyond use, and logits stay finite
# Settings of sampling that are of all scales or of each, and their ranges.
PER_SCALE = {"top_k": ANY, "top_p": SHARE, "temperature": (0.01, 100)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How samples and edits are drawn unless flags say otherwise; kept in the checkpoint."""

    cfg: float = 1.5  # guidance scale; 0: none
    top_k: tuple[int, ...] = (900,)  # of all scales, or of each; 0: all codes
    top_p: tuple[float, ...] = (0.96,)  # of all scales, or of each; 0: all of the probability
    # Of all scales, or of each. It divides the logits that top-k and top-p leave.
    temperature: tuple[float, ...] = (1.0,)
    # Where cfg applies: ramp (rises from 0 to cfg over the scales), constant, interval=LO-HI
    # (constant on these scales, counted from 1); ssg=BETA adds Scaled Spatial Guidance to ramp.
    guidance: str | Callable[..., Any] = "ramp"
    steps: int = 50  # of a dit's solver, from noise to image
    solver: str = "heun"  # of a dit: euler (first order) or heun (second, two passes a step)

    def __post_init__(self):
        check_ranges(self, cfg=(0, MAX_CFG), steps=(1, MAX_STEPS))
        if self.solver not in ("euler", "heun"):
            raise BadInput(f"solver={self.solver!r} is not one of euler, heun.")
        for name, (least, most) in PER_SCALE.items():
            values = getattr(self, name)
            if not values or not all(least <= value <= most for value in values):
                wanted = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise BadInput(
                    f"{name}={listed(values)}; expected {wanted}, once or for each scale."
                )
        if not callable(self.guidance):  # a program may have put a function there
            parse_guidance(self.guidance)

    def check(self, patch_nums: Schedule) -> None:
        """Raises BadInput if a setting is of another number of scales."""
        for name in PER_SCALE:
            if len(values := getattr(self, name)) not in (1, len(patch_nums)):
                raise BadInput(
                    f"{name}={listed(values)} has {len(values)} numbers; expected one, or one"
                    f" for each of patch_nums={patch_nums}."
                )
        numbers = parse_guidance(self.guidance)[1] if isinstance(self.guidance, str) else ()
        if len(numbers) == 2 and numbers[1] > len(patch_nums):
            raise BadInput(f"guidance={self.guidance}; there are {len(patch_nums)} scales.")

    def flags(self, kind: str) -> dict[str, Any]:
        """The settings that a kind of model is sampled with, as the flags take them."""
        if kind == "dit":
            return {"cfg": self.cfg, "steps": self.steps, "solver": self.solver}
        found = {"cfg": self.cfg} | {name: listed(getattr(self, name)) for name in PER_SCALE}
        return found | ({"guidance": self.guidance} if kind == "var" else {})


def listed(values: tuple[float, ...]) -> str:
    """The values of a setting as its flag takes them."""
    return ",".join(map(str, values))


def parse_guidance(text: str) -> tuple[str, tuple[float, ...]]:
    """`SamplingConfig.guidance` as its name and numbers. Raises: BadInput."""
    pattern = r"ramp|constant|interval=(\d{1,3})-(\d{1,3})|ssg=(\d{0,3}\.?\d{1,6})"
    match = re.fullmatch(pattern, text) if isinstance(text, str) else None
    numbers = tuple(float(n) for n in match.groups() if n is not None) if match else ()
    if not match or (len(numbers) == 2 and not 1 <= numbers[0] <= numbers[1]):
        raise BadInput(
            f"guidance={str(text)[:60]!r}; expected ramp, constant, interval=LO-HI (scales, the"
            " first is 1) or ssg=BETA."
        )
    return text.partition("=")[0], numbers
