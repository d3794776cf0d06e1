# %% [markdown]
# # Official weights
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/var_jax/blob/main/colab/3_official_weights.ipynb)
#
# The authors of [VAR](https://arxiv.org/abs/2404.02905) released their ImageNet models as PyTorch
# files. Here they are downloaded, converted, sampled from and used to edit an image. torch is not
# needed.

# %% {"cellView": "form"}
# @title Install
# @markdown The jax of this runtime is kept; it must be 0.10.2 or newer.
SOURCE = "git+https://github.com/OWNER/var_jax"  # @param {"type": "string"}
import importlib.util
import os
import pathlib

if importlib.util.find_spec("var_jax") is None:
    clone = pathlib.Path("..").resolve()
    source = clone.as_uri() if (clone / "setup.py").exists() else SOURCE
    # !pip freeze | grep -E "^(jax|jaxlib)==" > runtime.txt  # this jax knows the machine: it stays
    # !pip install -q -c runtime.txt "var_jax @ {source}"
# !pip install -q "huggingface_hub>=1,<3"

# %% [markdown]
# ## Choose a model
#
# | | parameters | download |
# |---|---|---|
# | `d16` | 310 M | 1.2 GB |
# | `d20` | 600 M | 2.4 GB |
# | `d24` | 1.0 B | 4.1 GB |
# | `d30` | 2.0 B | 8.1 GB |
#
# and 0.4 GB for the tokenizer. `d16` samples on a CPU; for the others take a GPU or a TPU. The models
# are for 256×256 pixels and the 1,000 classes of ImageNet.
#
# **The images kept in this file are not of these models.** Where it was run nothing could be
# downloaded, and `stand-in` made tiny files of the same structure with random weights: all steps are
# the same, and the images are textures.

# %%
import warnings

warnings.filterwarnings("ignore", "os.fork")  # how a notebook starts commands
MODEL = "d16"  # @param ["d16", "d20", "d24", "d30", "stand-in"]
MODEL = os.environ.get("VAR_JAX_MODEL", MODEL)
print(MODEL)

# %% [markdown]
# ## Download and convert
#
# `hub:d16` is a checkpoint for every command: at first use its files are downloaded, their size and
# hash are checked, and they are converted. Files that you have are converted by the command in the
# next cell. Names, shapes and values of all tensors are checked, and sizes are read from them; no
# code in a file is ever run.

# %%
CHECKPOINT = f"hub:{MODEL}"
if MODEL == "stand-in":
    from flax import nnx

    from var_jax.checkpoints.torch.convert import write_models
    from var_jax.config import TokenizerConfig, TransformerConfig
    from var_jax.models.tokenizer import Tokenizer
    from var_jax.models.var import Transformer

    small = TransformerConfig.from_depth(2)
    models = {
        "tokenizer": Tokenizer(TokenizerConfig(channels=32), rngs=nnx.Rngs(0)),
        "transformer": Transformer(small, rngs=nnx.Rngs(1)),
    }
    os.makedirs("official", exist_ok=True)
    write_models(models, {}, "official")
    # !python -m var_jax.convert --tokenizer official/tokenizer.pth --transformer official/transformer.pth --out converted
    CHECKPOINT = "converted"

# %%
import var_jax

model = var_jax.load(CHECKPOINT)
model

# %% [markdown]
# ## Sample
#
# A class is a number, or a name; names are those of ImageNet. `batch_size=4` keeps memory low. (The
# images kept here are all of the stand-in, whose weights are random.)

# %%
[name for name in model.class_names if "retriever" in name]

# %%
CLASSES = ["golden retriever", "macaw", "volcano", "cheeseburger"]
SEED = 0  # @param {"type": "integer"}
CFG = 4.0  # @param {"type": "slider", "min": 0, "max": 10, "step": 0.5}
tokens = model.sample_tokens(CLASSES, seed=SEED, cfg=CFG, top_k=900, top_p=0.96, batch_size=4)
samples = model.decode(tokens)
samples

# %% [markdown]
# Scale by scale, from 1×1 to 16×16 tokens:

# %%
from PIL import Image

scales = model.coarse_to_fine(tokens[:1])[0, :, ::2, ::2]
scales.view(var_jax.Images)

# %% [markdown]
# `smooth` mixes codes instead of choosing one: with trained weights nicer to look at, not for metrics.

# %%
model.sample(CLASSES, seed=SEED, cfg=CFG, smooth=True, batch_size=4)

# %% [markdown]
# ## Edit
#
# Give a photograph of your own in `PHOTO` (upload it at the left in Colab), or keep the first sample.
# The box (y0, x0, y1, x1), in fractions of the image, is repainted, without a class or as one; all
# tokens outside are kept (VAR, appendix B). First the original.

# %%
PHOTO = ""  # @param {"type": "string"}
BOX = (0.25, 0.25, 0.75, 0.75)
image = model.crop(PHOTO) if PHOTO else samples[0]

# %%
import numpy as np

same = model.edit(image, BOX, num=2, seed=1)
other = model.edit(image, BOX, label="macaw", num=1, seed=1, cfg=CFG)
np.stack([image, *same, *other]).view(var_jax.Images)

# %% [markdown]
# Where the last one differs from the original as the tokenizer reconstructs it (dark: nowhere). Outside
# of the box, tokens are the same:

# %%
original = np.asarray(model.decode(model.encode(image)))[0].astype(int)
change = np.abs(np.asarray(other)[0] - original).mean(-1)
Image.fromarray((change * 255 / change.max()).astype(np.uint8))

# %% [markdown]
# ## Back to PyTorch
#
# The same command writes files that the PyTorch release loads, also of a model that you trained or
# fine-tuned here. The round trip is exact to the bit.

# %%
# !python -m var_jax.convert --checkpoint {CHECKPOINT} --to_torch official_again

# %% [markdown]
# Next: [fine-tuning and your own images](4_your_own_images.ipynb), [TPU](5_tpu.ipynb),
# [scaling laws](6_scaling_laws.ipynb).
