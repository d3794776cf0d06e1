"""The device mesh, always ('data', 'fsdp', 'tensor'), and the shardings on it."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from var_jax import BadInput
from var_jax.config import TransformerConfig
from var_jax.tools.settings import pinned
from var_jax.tools.trees import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the batch is split over both


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all) with explicit axes; one size may be -1, "what is left".

    Where that is 'data', 'fsdp' is a limit: fewer devices, or a slice of fewer, still do.

    Of several TPU slices each holds whole rows of 'data', so that only gradients cross the slower
    network between them.

    Raises: BadInput when the sizes do not multiply to the number of devices, or 'data' does not
    to that of slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", None) for device in devices})
    count = len(devices)
    if data == -1 and min(fsdp, tensor) > 0:
        fsdp = math.gcd(fsdp, count // slices // tensor)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1 and 0 not in sizes:
        sizes[sizes.index(-1)] = max(count // math.prod(s for s in sizes if s != -1), 1)
    given = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise BadInput(f"mesh {given} does not cover the {count} devices exactly.")
    types = (AxisType.Explicit,) * 3
    if slices == 1:
        array = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(array, AXES, axis_types=types)
    if sizes[0] % slices:
        raise BadInput(f"mesh {given}: data={sizes[0]} is not a multiple of the {slices} slices.")
    inside = (sizes[0] // slices, *sizes[1:])
    array = create_hybrid_device_mesh(
        inside, (slices, 1, 1), devices=devices, allow_split_physical_axes=True
    )
    return Mesh(array, AXES, axis_types=types)


def sampling_mesh(fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all) that splits weights as far as training did, -1 being "all".

    Fewer devices split them less; 'tensor' stays inside a host.
    """
    devices = jax.devices() if devices is None else devices
    here = sum(device.process_index == devices[0].process_index for device in devices)
    tensor = math.gcd(max(tensor, 0), here)
    return make_mesh(-1, math.gcd(max(fsdp, 0), len(devices) // tensor), tensor, devices)


def data_mesh() -> Mesh | None:
    """A mesh of all devices along 'data'; None for a single device, which needs none."""
    return make_mesh(data=-1, fsdp=1, tensor=1) if jax.device_count() > 1 else None


@contextlib.contextmanager
def using(mesh: Mesh | None) -> Iterator[None]:
    """`jax.set_mesh(mesh)`, if there is one, and jax's settings as commands have them."""
    with pinned(), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Outside of any mesh, on a device of this process: for what one process does by itself.

    A program under a mesh is one of all its processes.
    """
    no_mesh = Mesh(np.empty((), object), ())
    with jax.set_mesh(no_mesh), jax.default_device(jax.local_devices()[0]):
        yield


def check_hosts(mesh: Mesh) -> None:
    """Raises BadInput if the devices of one image's 'tensor' group are on several hosts."""
    for group in mesh.devices.reshape(-1, mesh.shape["tensor"]):
        if len({device.process_index for device in group}) > 1:
            raise BadInput(
                f"mesh.tensor={mesh.shape['tensor']} reaches over hosts of"
                f" {len(mesh.local_devices) or mesh.size} devices; it must stay inside one."
            )


def check_model(config: TransformerConfig, mesh: Mesh) -> None:
    """Raises BadInput unless the transformer's heads, MLP, codes and width split evenly."""
    counts = {
        "num_heads": (config.num_heads, "tensor"),
        "width * mlp_ratio": (round(config.width * config.mlp_ratio), "tensor"),
        "width": (config.width, "fsdp"),
    }
    if config.kind != "dit":  # which predicts no codes
        counts["vocab_size"] = config.vocab_size, "tensor"
    for name, (count, axis) in counts.items():
        if count % mesh.shape[axis]:
            raise BadInput(
                f"transformer.{name}={count} cannot be split evenly over mesh.{axis}="
                f"{mesh.shape[axis]}."
            )


def check_mesh(mesh: Mesh, transformer: Any) -> None:
    """Raises BadInput unless the mesh is of the kind that `make_mesh` makes, and splits a model."""
    kinds = {*getattr(mesh, "axis_types", ())}
    if not isinstance(mesh, Mesh) or mesh.axis_names != AXES or kinds != {AxisType.Explicit}:
        raise BadInput(
            f"{mesh} has other axes than explicit {AXES}; var_jax.sharding.mesh.make_mesh"
            " makes such ones."
        )
    if transformer is not None:
        check_model(transformer.config, mesh)


def check_batch(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises BadInput unless every device gets an equal share of the batch."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % shares:
        raise BadInput(f"{name}={batch_size} cannot be split evenly over {shares} devices.")


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, split over the batch axes."""
    sharding = NamedSharding(mesh, P(BATCH))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_global_batch(batch: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds whole, split as by `put_batch`."""
    sharding = NamedSharding(mesh, P(BATCH))
    put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.tree.map(put, batch)


def local_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers, rows) of a batch that this process's devices hold, in order."""
    if x.is_fully_addressable:
        return np.arange(x.shape[0], dtype=np.int32), np.asarray(x)
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    starts = sorted(shards)
    numbers = [np.arange(s, s + len(shards[s]), dtype=np.int32) for s in starts]
    return np.concatenate(numbers), np.concatenate([np.asarray(shards[s]) for s in starts])


def to_host(tree: Any) -> Any:
    """Arrays of any layout as NumPy, whole on every process; call it under `jax.set_mesh`."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    gather = lambda x: np.asarray(jax.sharding.reshard(x, P()).addressable_data(0))
    return jax.tree.map(gather, tree)


def of_first(make: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The array of this shape that process 0 makes, on every process."""
    if jax.process_count() == 1:
        return make()
    first = jax.process_index() == 0
    return broadcast_one_to_all(make() if first else np.zeros(shape, dtype))


def replicated(path: tuple, leaf: Any) -> P:
    """The layout of a tree that every device holds whole."""
    return P()


def layout_of(table: dict[str, tuple]) -> Callable[[tuple, Any], P]:
    """(path, leaf) → PartitionSpec by the last name in the path; what is not in `table` is whole.

    Moments and averages are split as their weights. Weights of stacked blocks have one axis more.
    """

    def layout(path: tuple, leaf: Any) -> P:
        names = path_name(path).split(".")
        spec = table.get(names[-1], ()) if leaf.ndim > 1 else ()
        return P(None, *spec) if spec and "blocks" in names else P(*spec)

    return layout


def shard(tree: Any, mesh: Mesh, spec: Callable[[tuple, Any], P] = replicated) -> Any:
    """The tree of abstract leaves with shardings; `spec` maps (path, leaf) to a PartitionSpec."""
    place = lambda path, leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(path, leaf))
    )
    return jax.tree_util.tree_map_with_path(place, tree)
