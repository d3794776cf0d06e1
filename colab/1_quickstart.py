# %% [markdown]
# # Quickstart
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/var_jax/blob/main/colab/1_quickstart.ipynb)
#
# [VAR](https://arxiv.org/abs/2404.02905) generates an image as a sequence of token maps, from 1×1
# up to the full resolution: *next-scale prediction*. `var_jax` is VAR in JAX. Here you sample from a
# checkpoint that comes with the package, edit an image, and train a model of your own.
# It has run on CPUs and, with small models, on one NVIDIA GPU (an H100); for TPUs it has been
# compiled, but not run.

# %% {"cellView": "form"}
# @title Install
# @markdown The jax of this runtime is kept; it must be 0.10.2 or newer.
SOURCE = "git+https://github.com/OWNER/var_jax"  # @param {"type": "string"}
import importlib.util
import pathlib

if importlib.util.find_spec("var_jax") is None:
    clone = pathlib.Path("..").resolve()
    source = clone.as_uri() if (clone / "setup.py").exists() else SOURCE
    # !pip freeze | grep -E "^(jax|jaxlib)==" > runtime.txt  # this jax knows the machine: it stays
    # !pip install -q -c runtime.txt "var_jax[report] @ {source}"

# %% [markdown]
# ## Sample
#
# The checkpoint `emoji` draws 32×32 images of nine classes.

# %%
import warnings

import jax

jax.config.update("jax_platforms", "cpu")  # enough for it, and the accelerator stays free to train
warnings.filterwarnings("ignore", "os.fork")  # how a notebook starts commands

# %%
import var_jax

model = var_jax.load("emoji")
model.sample(["Flags", "Animals & Nature", "Smileys & Emotion", "Food & Drink"], seed=0)

# %% [markdown]
# `sample` takes a class for each image and returns a `uint8` array of shape `(N, 32, 32, 3)`. Image
# $i$ depends on the seed and $i$ alone.

# %%
CLASS = "Smileys & Emotion"  # @param ["Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects", "Symbols", "Flags"]
SEED = 1  # @param {"type": "integer"}
model.sample([CLASS] * 20, seed=SEED)

# %% [markdown]
# ## Coarse to fine
#
# Each row is an image after each scale: the model begins with a single token, and every scale adds
# detail to the sum of all before it. [How VAR works](2_how_var_works.ipynb) explains it.

# %%
tokens = model.sample_tokens(["Smileys & Emotion", "People & Body", "Flags"], seed=3)
model.coarse_to_fine(tokens)

# %% [markdown]
# ## Edit
#
# Repaint the upper half of an image, as any class: the tokens outside are kept. First the original,
# which is of the validation set.

# %%
import numpy as np

from var_jax.data.sources import open_source

person = open_source("emoji", "validation", size=32).images[26]
edited = model.edit(person, (0, 0, 0.5, 1), label="People & Body", num=7, seed=2)
np.stack([person, *edited]).view(var_jax.Images)

# %% [markdown]
# ## Train
#
# First the tokenizer, then the transformer on its tokens, from scratch, on 1,712 of the 1,906 Noto
# emoji in the package; 194 are for validation. This takes about 9 minutes on two CPU cores, longer if they have other work, as when this
# notebook was run; fewer steps are faster. The same command continues a training that was stopped.

# %%
TOKENIZER_STEPS = 1000  # @param {"type": "integer"}
TRANSFORMER_STEPS = 850  # @param {"type": "integer"}

# %%
# !python -m var_jax.train --config emoji --config.train_tokenizer.steps={TOKENIZER_STEPS} --config.train_transformer.steps={TRANSFORMER_STEPS}

# %% [markdown]
# ## Look
#
# The work directory `runs/emoji` holds the curves, in nats a token. Where the validation loss no longer
# falls, the transformer begins to memorize: 1,712 images are few.

# %%
from PIL import Image

curves = Image.open("runs/emoji/curves.png")
curves.resize((900, round(900 * curves.height / curves.width)))

# %% [markdown]
# A row for each image of the validation set: the image, what the tokenizer makes of it, and that after
# each scale:

# %%
Image.open("runs/emoji/reconstructions.png")

# %% [markdown]
# Your model, a row of images for each class:

# %%
mine = var_jax.load("runs/emoji/checkpoint")
mine.sample(np.repeat(np.arange(len(mine.class_names)), 10), seed=0)

# %% [markdown]
# Are they new? Below each sample is the training image that is nearest to it in pixels.

# %%
samples = mine.sample(["Flags", "Food & Drink", "Smileys & Emotion"] * 3, seed=2)
training_set = open_source("emoji", "train", size=32).images
pixels = lambda images: np.asarray(images, np.float32).reshape(len(images), 1, -1)
distance = np.linalg.norm(pixels(samples) - pixels(training_set).swapaxes(0, 1), axis=-1)
np.stack([samples, training_set[distance.argmin(1)]]).view(var_jax.Images)

# %% [markdown]
# ## Next
#
# [How VAR works](2_how_var_works.ipynb) ·
# [Official weights](3_official_weights.ipynb) ·
# [Your own images](4_your_own_images.ipynb) ·
# [TPU](5_tpu.ipynb) ·
# [Scaling laws](6_scaling_laws.ipynb)
