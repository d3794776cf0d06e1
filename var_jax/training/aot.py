"""Compiles training steps and samplers for TPUs that are not there, and reads what they cost.

Cycles are the TPU compiler's own estimate; attention kernels, which have none, are charged their
matrix products. Efficiency is against the estimate for one 8192³ bfloat16 product, 1.0: the time
that the model's operations would take at that rate, over the estimated time.
"""

import dataclasses
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from var_jax import BadInput
from var_jax.config import Config
from var_jax.models import backend
from var_jax.models.attention_tpu import cached_flops, padded_flops
from var_jax.models.features.inception import abstract_inception, inception
from var_jax.sampling.autoregressive import Weights
from var_jax.sampling.exports import build, placed
from var_jax.sampling.generate import sampler_of
from var_jax.schedule import Pattern, shape_of
from var_jax.sharding.mesh import BATCH, check_batch, check_hosts, check_model, shard
from var_jax.sharding.ops import data_parallel
from var_jax.tools import tpu_cost
from var_jax.tools.flops import matmul_flops, transformer_flops
from var_jax.training.loss_networks import abstract_loss_networks
from var_jax.training.state import Learner
from var_jax.training.tasks import task_of
from var_jax.training.tokenizer import step_flops

PROGRAMS = ("transformer", "pixels", "tokenizer", "sampler", "features")
OPERATIONS = 2 * 8192**3  # of the yardstick


class Chip(NamedTuple):
    """A TPU generation: memory in bytes, cycles of the yardstick, clock in Hz."""

    memory: int
    yardstick: int
    clock: float


CHIPS = {
    "v5e": Chip(16 * 2**30, 9_557_312, 1.5e9),
    "v5p": Chip(95 * 2**30, 4_652_072, 1.75e9),
    "v6e": Chip(32 * 2**30, 2_977_840, 1.75e9),
}


def tpu_devices(topology: str, slices: int) -> list[Any]:
    """The devices of a topology. Raises: BadInput if there is no such one, or no libtpu."""
    if topology.partition(":")[0] not in CHIPS:
        raise BadInput(f"--topology={topology!r} is not of {', '.join(CHIPS)}, like v5e:4x8.")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
    }  # fmt: skip
    jax.config.update("jax_platforms", "cpu")
    try:
        import libtpu  # type: ignore  # noqa: F401
    except ImportError as error:
        raise BadInput("libtpu is missing: pip install 'var_jax[tpu]' brings it.") from error
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"--topology={topology!r}: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def batch_of(config: Config, program: str) -> int:
    """The batch size the config sets for a program; what does not train takes the transformer's."""
    training = config.train_tokenizer if program == "tokenizer" else config.train_transformer
    return training.batch_size


def parts_of(config: Config, program: str) -> int:
    """In how many parts a program takes a batch."""
    return config.train_transformer.accumulate if program in ("transformer", "pixels") else 1


def examine(
    config: Config, program: str, mesh: Mesh, chip: Chip, batch_size: int
) -> dict[str, Any]:
    """The report on one program; what needs a compiled one is None where it does not fit."""
    check_batch("batch_size / accumulate", batch_size // parts_of(config, program), mesh)
    check_hosts(mesh)
    if program not in ("tokenizer", "features"):
        check_model(config.transformer, mesh)
    with jax.set_mesh(mesh):
        flops = model_flops(config, program) * batch_size / mesh.size
        lowered, parts = lower(config, program, mesh, batch_size)
        started, cpu = time.monotonic(), time.process_time()
        try:
            compiled, measured = lowered.compile(), {}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled, measured = None, too_large(str(error))
    return {
        "program": program,
        "chips": mesh.size,
        "mesh": "x".join(str(size) for size in mesh.axis_sizes),
        "batch_size": batch_size,
        "fits": compiled is not None,
        "memory_per_chip": chip.memory,
        **parts,
        "yardstick_cycles": (yardstick := round(flops * chip.yardstick / OPERATIONS)),
        **(measured or measure(compiled, config, chip, batch_size, yardstick)),
        "collective_bytes_fsdp": fsdp_bytes(config, program, mesh),
        "compile_seconds": round(time.monotonic() - started, 1),
        "compile_cpu_seconds": round(time.process_time() - cpu, 1),
    }


def measure(
    compiled: Any, config: Config, chip: Chip, batch_size: int, yardstick: int
) -> dict[str, Any]:
    """What the compiled program says of itself."""
    memory, program = compiled.memory_analysis(), tpu_cost.Program(compiled.as_text())
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    cycles, sent = tpu_cost.cycles(program), tpu_cost.collective_bytes(program)
    calls = tpu_cost.kernels(program)
    charged, unknown = kernel_cycles(calls, config, chip)
    total = cycles.total() + charged
    return {
        "bytes_activations": memory.temp_size_in_bytes,
        "bytes_per_chip": held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        "estimated_cycles": cycles.total(),
        "kernel_cycles_charged": charged,
        "kernels_not_charged": unknown,
        "efficiency": round(yardstick / total, 4),
        "clock_hz": chip.clock,
        "step_seconds": total / chip.clock,
        "images_per_second": batch_size / total * chip.clock,
        "cycles_by_group": dict(cycles.most_common()),
        "collective_bytes": sent.total(),
        "collective_bytes_by_kind": dict(sent.most_common()),
    }


def too_large(error: str) -> dict[str, Any]:
    """What is known of a program that does not fit: the bytes it wanted."""
    wanted = re.search(r"\(([\d.]+)G\)", error)
    names = ("estimated_cycles", "kernel_cycles_charged", "efficiency", "collective_bytes")
    size = round(float(wanted[1]) * 2**30) if wanted else None
    return {"bytes_per_chip": size, **dict.fromkeys(names)}


def lower(config: Config, program: str, mesh: Mesh, batch_size: int):
    """The lowered program, and bytes a chip of what it is given."""
    batch = abstract_batch(config, mesh, batch_size)
    if program == "sampler":
        return lower_sampler(config, mesh, batch["label"])
    if program == "features":
        weights = abstract_inception(NamedSharding(mesh, P()))
        lowered = jax.jit(data_parallel(inception)).lower(weights, batch["image"])
        return lowered, {"bytes_parameters": local_bytes(weights)}
    return lower_step(config, program, mesh, batch)


def abstract_batch(config: Config, mesh: Mesh, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Images, labels, and what a token cache would hold of them."""
    sharding = NamedSharding(mesh, P(BATCH))
    place = lambda dtype, *shape: jax.ShapeDtypeStruct(
        (batch_size, *shape), dtype, sharding=sharding
    )
    tokenizer = config.tokenizer
    return {
        "image": place(jnp.uint8, *shape_of(config.data.size), 3),
        "label": place(jnp.int32),
        "tokens": place(jnp.int32, config.transformer.num_tokens),
        "latent": place(jnp.float32, *shape_of(tokenizer.patch_nums[-1]), tokenizer.latent_dim),
    }


def lower_sampler(config: Config, mesh: Mesh, labels: jax.ShapeDtypeStruct):
    """`lower` of what `sample` runs."""
    models = {"tokenizer": build(config.tokenizer), "transformer": build(config.transformer)}
    weights = Weights(**placed(models, mesh))
    draw = sampler_of(config.transformer.kind, config.sampling)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), len(labels)))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=labels.sharding)
    lowered = draw.func.lower(weights, labels, keys, None, **draw.keywords)
    return lowered, {"bytes_parameters": local_bytes(weights)}


def lower_step(config: Config, program: str, mesh: Mesh, batch: dict[str, jax.ShapeDtypeStruct]):
    """`lower` of a training step: of the tokenizer, or of the transformer on pixels or tokens."""
    cached = "latent" if config.transformer.kind == "dit" else "tokens"
    tokenizer = shard(build(config.tokenizer), mesh)
    names, frozen = {
        "tokenizer": (["image"], shard(abstract_loss_networks(config.train_tokenizer), mesh)),
        "pixels": (["image", "label"], {"tokenizer": tokenizer}),
        "transformer": ([cached, "label"], {"quantizer": tokenizer.quantizer}),
    }[program]
    # Of progressive training the last stage, which is the largest.
    training = dataclasses.replace(config.train_transformer, progressive=0.0)
    task = task_of(dataclasses.replace(config, train_transformer=training), program)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = shard(jax.eval_shape(task.init, key), mesh, task.layout)
    step, count = jax.jit(task.step, donate_argnums=0), jax.ShapeDtypeStruct((), jnp.int32)
    is_learner = lambda part: isinstance(part, Learner)
    learners = filter(is_learner, jax.tree.leaves(state, is_leaf=is_learner))
    params = [learner.params for learner in learners]
    return step.lower(state, count, {name: batch[name] for name in names}, frozen, key), {
        "bytes_parameters": local_bytes((params, frozen)),
        "bytes_optimizer": local_bytes(state) - local_bytes(params),
    }


def local_bytes(tree: Any) -> int:
    """What one chip holds of abstract arrays."""
    shape = lambda leaf: leaf.sharding.shard_shape(leaf.shape)
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(shape(leaf)) for leaf in leaves)


def model_flops(config: Config, program: str) -> float:
    """Operations of one image that are the model's, whoever recomputes what."""
    if program == "features":
        image = jax.ShapeDtypeStruct((1, *shape_of(config.data.size), 3), jnp.uint8)
        with backend.assume("tpu"):
            return matmul_flops(inception, abstract_inception(), image)
    transformer = config.train_transformer.passes * transformer_flops(config.transformer)
    if program == "transformer":
        return transformer
    if program == "tokenizer":
        return step_flops(config.tokenizer, config.train_tokenizer)
    tokenizer = build(config.tokenizer)
    image = jax.ShapeDtypeStruct((1, *shape_of(config.data.size), 3), jnp.float32)
    codes = jax.ShapeDtypeStruct((1, config.transformer.num_tokens), jnp.int32)
    with backend.assume("tpu"):
        if program == "pixels":
            return transformer + matmul_flops(type(tokenizer).encode, tokenizer, image)
        guided = 2 if config.sampling.cfg else 1
        guided *= transformer_flops(config.transformer, backward=False)
        if config.transformer.kind == "dit":
            guided *= config.sampling.steps * (2 if config.sampling.solver == "heun" else 1)
        return guided + matmul_flops(type(tokenizer).decode, tokenizer, codes)


def kernel_cycles(calls: dict[str, int], config: Config, chip: Chip) -> tuple[int, dict[str, int]]:
    """What the attention kernels are charged: tiles visited, sides padded to 128, at the
    yardstick's rate. And how often kernels run that are not ours but the compiler's own: their
    cost is not known, so an efficiency beside any flatters.
    """
    pattern, width, charge = config.transformer.pattern, config.transformer.head_dim, {}
    for name in calls:  # which say how many images, heads and tokens
        sizes = [int(size) for size in re.findall(r"\d+", name)]
        if name.startswith("cached_attention_"):
            batch, heads, new, kept = sizes
            charge[name] = batch * heads * cached_flops(new, kept, width)
        elif name.startswith("block_causal_"):
            batch, heads, length = sizes
            of_image = padded_flops(first_tokens(pattern, length), width, "backward" in name)
            charge[name] = batch * heads * of_image
    flops = sum(charge.get(name, 0) * times for name, times in calls.items())
    unknown = {name: times for name, times in calls.items() if name not in charge}
    return round(flops * chip.yardstick / OPERATIONS), unknown


def first_tokens(pattern: Pattern, length: int) -> Pattern:
    """The pattern of so many tokens: its first blocks, or else a block alone."""
    if length not in pattern.ends:
        return Pattern.full(length)
    return Pattern(pattern.blocks[: pattern.ends.index(length) + 1], pattern.window)


def fsdp_bytes(config: Config, program: str, mesh: Mesh) -> int:
    """Bytes that sharded weights need: each gathered forward and backward, and its gradient
    reduced, in two bytes."""
    if program in ("tokenizer", "sampler", "features"):
        return 0
    leaves = jax.tree.leaves(build(config.transformer))
    weights = sum(leaf.size for leaf in leaves) // mesh.shape["tensor"]
    return 3 * 2 * weights * config.train_transformer.accumulate


def largest(config: Config, program: str, mesh: Mesh, chip: Chip, report: dict[str, Any]) -> int:
    """The largest batch a chip that fits, by halving steps; each try is a compile."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"] * parts_of(config, program)
    fits = lambda n: examine(config, program, mesh, chip, n * shares)["fits"]
    low = report["batch_size"] // shares if report["fits"] else 0
    high = max(2 * low, report["batch_size"] // shares)
    while low and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * parts_of(config, program)
