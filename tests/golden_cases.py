"""Reads the golden cases: numbers of the public PyTorch implementation on fixed inputs.

`golden/*.npz` hold inputs and results, `golden/*.shapes.json` the names and shapes of a state dict.
Weights are random, tensor by tensor, from (seed, name, shape); see `weight`.
"""

import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from var_jax.checkpoints.torch.names import from_torch
from var_jax.config import TokenizerConfig, TransformerConfig
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.var import Transformer

FOLDER = pathlib.Path(__file__).parent / "golden"
CASES = ("base", "shared_adaln_no_l2", "znorm_nonshared_phi")
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")  # derived


def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def facts() -> dict:
    """Parameter counts, initialisation statistics, tensors without weight decay."""
    return json.loads((FOLDER / "facts.json").read_text())


def weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 tensor that the golden cases use under this checkpoint name."""
    key = [seed, zlib.crc32(name.encode())]
    noise = np.random.default_rng(key).standard_normal(shape, dtype=np.float32)
    f32, is_bias = np.float32, name.endswith(".bias") or name.endswith("_bias")
    if name.endswith("zero_k_bias"):
        return np.zeros(shape, np.float32)
    if "scale_mul" in name:
        return f32(np.log(4.0)) + 0.1 * noise
    if name == "quantize.embedding.weight":
        return 0.6 * noise
    if "norm" in name and name.endswith(".weight"):
        return 1.0 + 0.1 * noise
    if is_bias:
        return 0.1 * noise
    if len(shape) == 4:
        return noise / f32(np.sqrt(np.prod(shape[1:])))
    if len(shape) == 2 and "emb" not in name:
        return (4.0 if name == "head.weight" else 1.0) * noise / f32(np.sqrt(shape[1]))
    return 0.5 * noise


def state_dict(name: str, part: str, seed: int) -> dict[str, np.ndarray]:
    """`part` is "tokenizer" or "transformer"; derived buffers are left out."""
    shapes = json.loads((FOLDER / f"{name}.shapes.json").read_text())[part]
    return {n: weight(n, tuple(s), seed) for n, s in shapes if not n.endswith(BUFFERS)}


@functools.cache
def models(name: str) -> tuple[Tokenizer, Transformer, dict[str, np.ndarray]]:
    """Tokenizer and transformer of a case with its weights, and its arrays."""
    case = load(name)
    c = json.loads(str(case["config"]))
    shared = {k: c[k] for k in ("vocab_size", "latent_dim")} | {
        "patch_nums": tuple(c["patch_nums"])
    }
    tokenizer = TokenizerConfig(
        **shared,
        channels=c["ch"],
        num_phi=c["num_phi"],
        phi_ratio=c["phi_ratio"],
        codebook_znorm=c["codebook_znorm"],
    )
    sizes = {k: c[k] for k in ("depth", "width", "num_heads", "num_classes", "shared_adaln")}
    transformer = TransformerConfig(
        **shared, **sizes, qk_norm=c["qk_l2_norm"], dtype="float32", drop_path=0.1
    )
    built = (
        jax.eval_shape(lambda: Tokenizer(tokenizer, rngs=nnx.Rngs(0))),
        jax.eval_shape(lambda: Transformer(transformer, rngs=nnx.Rngs(0))),
    )
    weights = (
        from_torch(built[0], state_dict(name, "tokenizer", c["weights_seed_tokenizer"])),
        from_torch(built[1], state_dict(name, "transformer", c["weights_seed_transformer"])),
    )
    return *jax.tree.map(jnp.asarray, weights), case
