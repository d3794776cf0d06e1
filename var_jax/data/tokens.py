"""Codes computed ahead of training, so that the tokenizer runs once instead of every epoch."""

import dataclasses

import numpy as np
from jaxtyping import Int32


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """Items `tokens`, int32 (L,), and `label`, int32 (); one a picture or augmented copy."""

    tokens: Int32[np.ndarray, "N L"]
    labels: Int32[np.ndarray, " N"]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens[index], "label": self.labels[index]}
