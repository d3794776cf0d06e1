"""Reads the golden cases of evaluation: what the public tools compute on fixed inputs, on a CPU.

`golden/evaluation.npz`: torch-fidelity 0.4.0 (Inception features, FID, Inception score, KID,
precision, recall), NumPy as the ADM evaluator uses it, the package lpips. `golden/features.npz`:
efficientnet-lite-pytorch 0.1.0, the DINOv2 release (two blocks of width 128) and scikit-image.
`golden/*.shapes.json` hold names and shapes of state dicts, filled by `weight`.
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np
from golden_cases import FOLDER

from var_jax.checkpoints.torch.pth import write_pth


def weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The float32 tensor that the cases use under this name."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) == 4:
        return noise * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if len(shape) == 2:
        return noise / np.float32(np.sqrt(shape[1]))
    if len(shape) == 3:
        return 0.5 * noise
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(noise)
    for ending, mean in (
        (r"\bbn\.weight", 1.25), (r"\bbn\.bias", -0.3), (r"(_bn\d|norm\d?)\.weight", 1.0),
        (r"\.gamma", 0.5),
    ):  # fmt: skip
        if re.search(f"{ending}$", name):
            return mean + 0.1 * noise
    return 0.1 * noise


def weights_file(folder: Path, case: str, key: str, **changed: np.ndarray | None) -> Path:
    """A .pth of the state dict `key` of `case`; `changed` replaces tensors, or drops them."""
    shapes = json.loads((FOLDER / f"{case}.shapes.json").read_text())[key]
    tensors = {name: np.asarray(weight(name, tuple(shape))) for name, shape in shapes} | changed
    path = folder / f"{key}.pth"
    write_pth(path, {name: array for name, array in tensors.items() if array is not None})
    return path
