# %% [markdown]
# # TPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/var_jax/blob/main/colab/5_tpu.ipynb)
#
# How one program runs on many devices: the mesh, how weights and data lie on it, and how to compile
# for a TPU pod that you do not have. Eight virtual CPU devices are enough to see it; with `real` the
# notebook takes the devices of its runtime.

# %% {"cellView": "form"}
# @title Install
# @markdown The jax of this runtime is kept; it must be 0.10.2 or newer.
SOURCE = "git+https://github.com/OWNER/var_jax"  # @param {"type": "string"}
import importlib.util
import pathlib

if None in map(importlib.util.find_spec, ("var_jax", "libtpu", "rich")):
    clone = pathlib.Path("..").resolve()
    source = clone.as_uri() if (clone / "setup.py").exists() else SOURCE
    # !pip freeze | grep -E "^(jax|jaxlib)==" > runtime.txt  # this jax knows the machine: it stays
    # !pip install -q -c runtime.txt "var_jax[tpu] @ {source}" rich

# %%
DEVICES = "virtual"  # @param ["virtual", "real"]

# %%
import warnings

import jax

warnings.filterwarnings("ignore", "os.fork")  # how a notebook starts commands
if DEVICES == "virtual":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.devices()

# %% [markdown]
# ## The mesh
#
# The mesh always has three axes; an axis of size 1 costs nothing. The batch is split over *data* and
# *fsdp*, weights and moments of the optimizer over *fsdp*, and heads, MLP and vocabulary over
# *tensor*.

# %%
from var_jax.sharding.mesh import make_mesh

two = 2 if jax.device_count() % 8 == 0 else 1
mesh = make_mesh(data=-1, fsdp=two, tensor=two)
mesh

# %% [markdown]
# ## How arrays lie on it
#
# A batch of tokens, `(B, L)`: rows are split, over *data* and *fsdp*. Devices of the same *tensor* group
# hold the same rows.

# %%
import functools

import numpy as np

import var_jax
from var_jax.sharding.mesh import put_global_batch

show = functools.partial(jax.debug.visualize_array_sharding, scale=0.05, min_width=12)

model = var_jax.load("emoji", mesh=mesh)
transformer = model.models.transformer
tokens = np.zeros((8, transformer.config.num_tokens), np.int32)
show(put_global_batch(tokens, mesh))

# %% [markdown]
# The first matrix of an MLP, `(D, F)`: its rows are split over *fsdp*, its columns over *tensor*.
# Before use it is gathered over *fsdp*, layer by layer, so that no device ever holds the whole model.

# %%
with jax.set_mesh(mesh):
    show(transformer.blocks.fc1[0])

# %% [markdown]
# The second, `(F, D)`: the other way round, so that the product of both needs one sum over *tensor*.

# %%
with jax.set_mesh(mesh):
    show(transformer.blocks.fc2[0])

# %% [markdown]
# An embedding of the classes, `(classes + 1, D)`, and a bias, which every device holds whole:

# %%
with jax.set_mesh(mesh):
    show(transformer.class_embed[...])
    show(transformer.word_bias[...])

# %% [markdown]
# ## The same numbers
#
# Sampling is one jitted program on all devices. Image $i$ comes from the seed and $i$, so a mesh
# changes nothing:

# %%
labels = ["Flags", "Smileys & Emotion", "Animals & Nature", "Food & Drink"] * 2
on_mesh = model.sample(labels, seed=0)
alone = var_jax.load("emoji").sample(labels, seed=0)
print(f"pixels that differ: {(on_mesh != alone).mean():.2%}")
on_mesh

# %% [markdown]
# Training takes the same mesh by flags, here four steps of the tokenizer and four of the transformer
# on eight virtual devices:

# %%
# !JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m var_jax.train --config emoji --workdir runs/mesh --config.mesh.fsdp=2 --config.mesh.tensor=1 --config.train_tokenizer.steps=4 --config.train_transformer.steps=4 --config.report=

# %% [markdown]
# On a TPU VM leave the two variables out, and on a pod start it on all hosts with `--distributed`;
# `launch/` in the repository has the scripts.
#
# ## A pod that is not there
#
# `aot` compiles the very train step for a TPU topology, on this machine, with the TPU's own compiler.
# It tells whether the step fits into the memory of a chip, the compiler's estimate of its cycles, and
# what the chips send each other.

# %%
CONFIG = "imagenet:d16"  # @param ["imagenet:d16", "imagenet:d20", "imagenet:d24", "imagenet:d30", "imagenet:d36", "emoji"]
TOPOLOGY = "v5e:4x8"  # @param ["v5e:2x2", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5p:4x4x4", "v6e:8x8"]

# %%
# !python -m var_jax.aot --config {CONFIG} --topology {TOPOLOGY}

# %% [markdown]
# `efficiency` compares the step with one large matrix product of as many operations, whose cycles are
# `yardstick_cycles`; results of all sizes are in [benchmarks/aot.md](../benchmarks/aot.md). Cycles are
# estimates of the compiler: nothing here has been measured on a TPU.
