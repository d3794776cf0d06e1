"""What does not split evenly over the mesh is said in a sentence with both numbers."""

import jax
import pytest

from var_jax import BadInput
from var_jax.config import TransformerConfig
from var_jax.sharding.mesh import check_batch, check_model, make_mesh, sampling_mesh


def test_sizes_that_do_not_divide():
    mesh = make_mesh(1, 2, 4)
    with pytest.raises(BadInput, match=r"num_heads=30 cannot be split evenly over mesh\.tensor=4"):
        check_model(TransformerConfig(width=1920, num_heads=30), mesh)
    with pytest.raises(BadInput, match=r"width=100 cannot be split evenly over mesh\.fsdp=8"):
        check_model(TransformerConfig(width=100, num_heads=4), make_mesh(1, 8, 1))
    with pytest.raises(BadInput, match=r"width \* mlp_ratio=1382 cannot be split evenly over mesh"):
        check_model(TransformerConfig(width=512, num_heads=8, mlp_ratio=2.7), mesh)
    with pytest.raises(BadInput, match="batch_size=7 cannot be split evenly over 2 devices"):
        check_batch("batch_size", 7, mesh)
    with pytest.raises(BadInput, match="data=3 x fsdp=1 x tensor=1 does not cover the 8 devices"):
        make_mesh(3, 1, 1)
    with pytest.raises(BadInput, match="data=-1 x fsdp=0 x tensor=1 does not cover the 8 devices"):
        make_mesh(-1, 0, 1)


class Device:
    """Enough of a TPU device for a mesh of several slices."""

    platform, device_kind = "tpu", "TPU v5 lite"

    def __init__(self, index, slices):
        self.id, self.slice_index, self.process_index = index, index * slices // 8, index // 4
        self.coords, self.core_on_chip = (index % 4, 0, 0), 0


def test_slices_hold_whole_rows_of_data():
    devices = [Device(i, 2) for i in range(8)]
    with pytest.raises(BadInput, match="data=1 is not a multiple of the 2 slices"):
        make_mesh(1, 8, 1, devices=devices)


def test_all_devices_are_the_default():
    assert make_mesh(-1, 2, 1).shape == {"data": jax.device_count() // 2, "fsdp": 2, "tensor": 1}
    assert make_mesh(-1, 16, 2).shape == {"data": 1, "fsdp": 4, "tensor": 2}  # 8 devices only


@pytest.mark.parametrize(
    ("trained", "devices", "sizes"),
    [
        ((1, 1), 8, (8, 1, 1)),
        ((16, 1), 8, (1, 8, 1)),
        ((4, 2), 8, (1, 4, 2)),
        ((2, 2), 6, (3, 1, 2)),
        ((4, 4), 2, (1, 1, 2)),
        ((-1, 1), 8, (1, 8, 1)),
        ((2, -1), 4, (1, 1, 4)),
        ((3, 1), 8, (8, 1, 1)),
    ],
)
def test_sampling_splits_weights_as_training_did_as_far_as_devices_go(trained, devices, sizes):
    assert sampling_mesh(*trained, jax.devices()[:devices]).axis_sizes == sizes
