"""Analytic operation counts: a multiplication and an addition are two operations."""

from var_jax.config import TransformerConfig
from var_jax.schedule import slices

# Dense bfloat16 operations a second, from the makers' data sheets, by how jax names the device.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """What a device could do at most; None where it is not known."""
    fits = [name for name in PEAKS if name in device_kind]
    return PEAKS[max(fits, key=len)] if fits else None


def transformer_flops(config: TransformerConfig, *, backward: bool = True) -> int:
    """Matrix products of one image's forward pass, three times that with the backward pass.

    Weights that every token meets count for L tokens, AdaLN's for one; attention counts the pairs
    that a token may see. Nothing recomputed is counted.
    """
    D, F = config.width, round(config.width * config.mlp_ratio)
    C, V = config.latent_dim, config.vocab_size
    by_token = config.depth * (4 * D * D + 2 * D * F) + C * D + D * V
    by_image = 2 * D * D + 6 * D * D * (1 if config.shared_adaln else config.depth)
    pairs = sum(s.stop * (s.stop - s.start) for s in slices(config.patch_nums))
    forward = 2 * (by_token * config.num_tokens + by_image) + 4 * config.depth * D * pairs
    return forward * (3 if backward else 1)
