"""Tests run on 8 virtual CPU devices, with shapes and dtypes checked.

Programs compiled by any worker or subprocess of a run are kept for the others.
"""

import atexit
import functools
import gc
import os
import pathlib
import shutil
import signal
import tempfile

# Before jax is imported; subprocesses of a test and the workers of xdist inherit these.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="var_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jaxtyping
import optax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("var_jax", "typechecker.check")

# Under nohup SIGHUP is ignored, and whatever a test starts would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

MOST_MAPS = 15_000


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Lets go of compiled programs once they map much memory.

    Linux gives a process 65,530 maps, and XLA crashes where it gets no more.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def cudnn_in_xla(monkeypatch):
    """NVIDIA's attention as a program of XLA's; the lengths (L, S) that it was called with."""
    plain, lengths = jax.nn.dot_product_attention, []

    def run(q, k, v, *, implementation, **how):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        lengths.append((q.shape[1], k.shape[1]))
        return plain(q, k, v, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", run)
    return lengths


def relaxed(f):
    """`f` with jax's default promotion: the strict settings are for our code, not for optax's."""

    @functools.wraps(f)
    def run(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return f(*args, **kwargs)

    return run


def relaxed_adam(*args, adam=optax.scale_by_adam, **kwargs):
    """Adam's bias correction takes a float to the power of an integer."""
    init, update = adam(*args, **kwargs)
    return optax.GradientTransformation(init, relaxed(update))


optax.scale_by_adam = relaxed_adam
