"""Tests run on 8 virtual CPU devices, also where there is an accelerator."""

import os

# Before jax is imported; subprocesses of a test inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_num_cpu_devices", 8)
