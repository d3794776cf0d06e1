"""Speed of encoding, of a transformer's gradient and of sampling, beside the PyTorch release.

    python benchmarks/speed.py [--size small|d16] [--rounds 5] [--reference PATH] [--products]

PATH is a clone of github.com/FoundationVision/VAR (needs torch and huggingface_hub). Both run in
this process on the same threads in float32, in turn, with random weights. Times are medians,
compiling is apart.
--products also times the matrix products and convolutions of each task, each shape by itself.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("KMP_BLOCKTIME", "0")  # idle torch threads must not spin beside ours

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import jaxprs_in_params

from var_jax.config import TokenizerConfig, TransformerConfig
from var_jax.models.tokenizer import Tokenizer
from var_jax.models.var import Transformer
from var_jax.sampling.autoregressive import Weights, sample
from var_jax.sampling.generate import image_keys
from var_jax.schedule import num_tokens

Task = Callable[[], object]
PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the batch each task is measured with."""

    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    batch: int


def sizes() -> dict[str, Size]:
    """d16 at 256 px as released, and one that fits a laptop, at 128 px."""
    small = {"patch_nums": (1, 2, 3, 4, 6, 8), "vocab_size": 1024}
    narrow = TransformerConfig.from_depth(4, **small, dtype="float32")
    full = TransformerConfig.from_depth(16, dtype="float32")
    return {
        "small": Size(TokenizerConfig(**small, channels=32), narrow, 8),
        "d16": Size(TokenizerConfig(), full, 2),
    }


def main() -> None:
    """One row a task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(sizes()), default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", help="a clone of the PyTorch release")
    parser.add_argument("--products", action="store_true", help="seconds of the products alone")
    args = parser.parse_args()
    size = sizes()[args.size]
    rng = np.random.default_rng(0)
    side = size.transformer.patch_nums[-1] * size.tokenizer.downsample
    image = rng.uniform(-1, 1, (size.batch, side, side, 3)).astype(np.float32)
    labels = rng.integers(0, size.transformer.num_classes, size.batch).astype(np.int32)
    theirs = reference_tasks(args.reference, size, image, labels) if args.reference else {}
    ours = our_tasks(size, image, labels)
    print(f"{args.size}, batch {size.batch}, {num_tokens(size.transformer.patch_nums)} tokens")
    heads = ["task", "compile s", "s", "images/s", "tokens/s"]
    heads += ["PyTorch s", "ratio"] * bool(theirs) + ["products alone s"] * args.products
    print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads))
    for name, (function, arguments) in ours.items():
        task = functools.partial(run, function, *arguments)
        started = time.perf_counter()
        task()
        compiling = time.perf_counter() - started
        tasks = [task, theirs[name]] if theirs else [task]
        tasks[-1]()
        times = interleaved(tasks, args.rounds)
        mine = statistics.median(times[0])
        rate = size.batch / mine
        row = f"| {name} | {compiling - mine:.1f} | {mine:.3f} | {rate:.2f} "
        row += f"| {rate * num_tokens(size.transformer.patch_nums):.0f} |"
        if theirs:
            ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
            row += f" {statistics.median(times[1]):.3f} | {ratio:.2f} |"
        if args.products:
            row += f" {time_of_products(function, arguments, args.rounds):.3f} |"
        print(row, flush=True)


def interleaved(tasks: Sequence[Task], rounds: int) -> list[list[float]]:
    """Seconds of each task, in turn, so that other work on the machine slows all alike."""
    times: list[list[float]] = [[] for _ in tasks]
    for _ in range(rounds):
        for task, kept in zip(tasks, times, strict=True):
            started = time.perf_counter()
            task()
            kept.append(time.perf_counter() - started)
    return times


def run(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function and waits for its result."""
    jax.block_until_ready(function(*arguments))


def time_of_products(
    function: Callable[..., Any], arguments: tuple[Any, ...], rounds: int
) -> float:
    """Seconds of the products of a function, each timed by itself as often as it occurs, without
    the time of calling it; all branches count.
    """
    counts = products(jax.make_jaxpr(function)(*arguments).jaxpr)
    nothing = functools.partial(run, jax.jit(lambda: jnp.zeros(())))
    nothing()
    called, total = statistics.median(interleaved([nothing], 10 * rounds)[0]), 0.0
    for (_, shapes, _), (equation, count) in counts.items():
        alone = jax.jit(functools.partial(equation.primitive.bind, **equation.params))
        task = functools.partial(run, alone, *(jnp.ones(shape, kind) for shape, kind in shapes))
        task()
        total += count * max(statistics.median(interleaved([task], rounds)[0]) - called, 0)
    return total


def products(jaxpr: Any, times: int = 1) -> dict[Any, tuple[Any, int]]:
    """An equation of each kind of product in a program, and how often it is evaluated."""
    found: dict[Any, tuple[Any, int]] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            shapes = tuple((x.aval.shape, x.aval.dtype) for x in equation.invars)
            key = equation.primitive.name, shapes, str(equation.params)
            found[key] = equation, found.get(key, (equation, 0))[1] + times
        inside = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for inner in jaxprs_in_params(equation.params):
            for key, (each, count) in products(inner, inside).items():
                found[key] = each, found.get(key, (each, 0))[1] + count
    return found


def our_tasks(size: Size, image: np.ndarray, labels: np.ndarray) -> dict[str, tuple[Any, tuple]]:
    """Encode, forward and backward, sample: a jitted function and its arguments."""
    tokenizer = jax.jit(lambda: Tokenizer(size.tokenizer, rngs=nnx.Rngs(0)))()
    transformer = jax.jit(lambda: Transformer(size.transformer, rngs=nnx.Rngs(1)))()
    encode = jax.jit(Tokenizer.encode)
    tokens = encode(tokenizer, image)
    inputs = jax.jit(lambda t, idx: t.quantizer.teacher_forcing_inputs(idx))(tokenizer, tokens)
    weights = Weights(tokenizer, transformer)
    keys = image_keys(0, jnp.arange(size.batch))

    def loss(transformer):
        logits = transformer(labels, inputs, key=jax.random.key(0))
        target = jax.nn.one_hot(tokens, logits.shape[-1])
        return optax.softmax_cross_entropy(logits, target).mean()

    gradient = jax.jit(jax.value_and_grad(loss))
    return {
        "encode": (encode, (tokenizer, image)),
        "forward and backward": (gradient, (transformer,)),
        "sample": (sample, (weights, labels, keys)),
    }


def reference_tasks(
    path: str, size: Size, image: np.ndarray, labels: np.ndarray
) -> dict[str, Task]:
    """The same three tasks of the PyTorch release."""
    import torch

    sys.path.insert(0, path)
    from models import build_vae_var  # type: ignore[import-not-found]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = size.transformer
    vae, var = build_vae_var(
        "cpu", config.patch_nums, V=config.vocab_size, ch=size.tokenizer.channels,
        num_classes=config.num_classes, depth=config.depth, shared_aln=config.shared_adaln,
        flash_if_available=False, fused_if_available=False,
    )  # fmt: skip
    for parameter in vae.parameters():  # the release leaves them uninitialized before loading
        torch.nn.init.normal_(parameter, std=0.02)
    vae.eval()
    pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    wanted = torch.from_numpy(labels.astype(np.int64))
    with torch.no_grad():
        idx = vae.img_to_idxBl(pixels)
        inputs = vae.quantize.idxBl_to_var_input(idx)
    target = torch.cat(idx, 1).flatten()

    def encode():
        with torch.no_grad():
            vae.img_to_idxBl(pixels)

    def gradient():
        var.train()
        var.zero_grad(set_to_none=True)
        logits = var(wanted, inputs).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, target).backward()

    def draw():
        var.eval()
        var.autoregressive_infer_cfg(size.batch, wanted, g_seed=0, cfg=1.5, top_k=900, top_p=0.96)

    return {"encode": encode, "forward and backward": gradient, "sample": draw}


if __name__ == "__main__":
    main()
