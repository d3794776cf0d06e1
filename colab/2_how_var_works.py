# %% [markdown]
# # How VAR works
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/var_jax/blob/main/colab/2_how_var_works.ipynb)
#
# [Visual Autoregressive Modeling](https://arxiv.org/abs/2404.02905) (VAR) predicts an image as
# $K$ token maps $r_1, \dots, r_K$ of growing size. Each is sampled at once, given all coarser ones:
#
# $$p(r_1, \dots, r_K) = \prod_{k=1}^{K} p(r_k \mid r_1, \dots, r_{k-1}) \qquad \text{(VAR §3.2)}$$
#
# This notebook takes a small trained VAR apart: the tokenizer that makes the maps, the transformer
# that predicts them, and how samples are drawn.

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
    # !pip install -q -c runtime.txt "var_jax @ {source}"

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import var_jax
from var_jax.data.sources import open_source
from var_jax.models.attention import attention
from var_jax.models.resize import downsample
from var_jax.models.tokenizer import to_float
from var_jax.schedule import PATCH_NUMS_256, Pattern, level_ids, slices

plt.rcParams |= {"figure.dpi": 80, "image.interpolation": "nearest"}
ON_CPU = jax.default_backend() == "cpu"  # elsewhere float32 products are rounded by default
model = var_jax.load("emoji", dtype="float32")
tokenizer, quantizer = model.models.tokenizer, model.models.tokenizer.quantizer
transformer = model.models.transformer
validation = open_source("emoji", "validation", size=32)
model

# %% [markdown]
# ## 1. An image is a sequence of token maps
#
# The tokenizer turns an image into one token map for each scale. This model has twelve: 1×1 three
# times, 2×2 twice and 4×4 seven times. The paper's models for 256 px have ten, from 1×1 to 16×16.
#
# Three images of the validation set, which the model has not seen: in each row the image decoded
# from the first 1, 2, …, 12 token maps.

# %%
chosen = [7, 62, 178]
images = validation.images[chosen]
tokens = model.encode(images)
model.coarse_to_fine(tokens)

# %% [markdown]
# ## 2. Residual codes
#
# All scales describe the *same* latent $f = \mathcal{E}(\text{image})$, an $h \times w$ grid of
# vectors. Scale $k$ encodes what the coarser scales have left over (VAR, Algorithm 1):
#
# $$r_k = \mathcal{Q}\big(\mathrm{down}_{p_k}(f - \hat f_{k-1})\big), \qquad
#   \hat f_k = \hat f_{k-1} + \phi_k\big(\mathrm{up}(Z[r_k])\big), \qquad \hat f_0 = 0$$
#
# $\mathrm{down}$ averages the residual to $p_k \times p_k$ vectors, $\mathcal{Q}$ takes the nearest
# code of the codebook $Z$ for each, $\mathrm{up}$ interpolates to full size, and $\phi_k$ is a
# convolution. In code:


# %%
@jax.jit
def encode(tokenizer, image):
    f, quantizer = tokenizer.latent(to_float(image)), tokenizer.quantizer
    f_hat, tokens, left = jnp.zeros_like(f), [], []
    for k, p in enumerate(model.patch_nums):
        r_k = quantizer.nearest(downsample(f - f_hat, p))
        f_hat = f_hat + quantizer.contribution(k, quantizer.codebook[...][r_k])
        tokens.append(r_k.reshape(len(image), p * p))
        left.append(((f - f_hat) ** 2).mean((1, 2, 3)) / (f**2).mean((1, 2, 3)))
    return jnp.concatenate(tokens, axis=1), jnp.stack(left, axis=1)


found, left = encode(tokenizer, images)
print("same tokens as the library:", bool((found == tokens).all()))
assert (found == tokens).all() or not ON_CPU

# %% [markdown]
# The token maps of the first image (a colour for each code), what each scale adds to a white image
# (grey is nothing), and the sum so far:

# %%
token_maps = [
    tokens[0, s].reshape(p, p) for s, p in zip(slices(model.patch_nums), model.patch_nums)
]
sums = model.coarse_to_fine(tokens[:1])[0] / 255
added = np.diff(sums, axis=0, prepend=np.ones_like(sums[:1]))

figure, axes = plt.subplots(3, len(token_maps), figsize=(10, 2.7), layout="constrained")
for k, p in enumerate(model.patch_nums):
    axes[0, k].imshow(token_maps[k] * 37 % 256, cmap="hsv", vmin=0, vmax=256)
    axes[1, k].imshow((0.5 + added[k]).clip(0, 1))
    axes[2, k].imshow(sums[k])
    axes[0, k].set_title(f"{p}×{p}", fontsize=9)
for axis, name in zip(axes[:, 0], ["tokens", "adds", "sum"]):
    axis.set_ylabel(name)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# Every scale explains a part of what is left of the latent:

# %%
_, left = encode(tokenizer, validation.images)
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.plot(np.arange(1, 1 + len(model.patch_nums)), left.mean(0), "o-")
axis.set(xlabel="scale $k$", ylabel=r"$\|f - \hat f_k\|^2 \,/\, \|f\|^2$", ylim=(0, None))
axis.set_title("validation set", loc="left", fontsize=10)
axis.set_xticks(np.arange(1, 1 + len(model.patch_nums)), [f"{p}×{p}" for p in model.patch_nums])
axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## 3. The block-causal mask
#
# The transformer reads all tokens as one sequence. Its input at scale $k$ is the sum
# $\hat f_{k-1}$, averaged to $p_k \times p_k$; at scale 1 it is the class. A token attends to its
# own scale (dark) and to all coarser ones (light), so that the tokens of a scale can be sampled
# together. Left the model above, right the paper's schedule for 256 px.

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for axis, patch_nums in zip(axes, [model.patch_nums, PATCH_NUMS_256]):
    pattern = Pattern.block_causal(patch_nums)
    level = level_ids(patch_nums)
    axis.imshow(pattern.mask() + 1 * (level[:, None] == level), cmap="Blues", vmax=2.5)
    last = [f"{p}×{p}" for p in patch_nums[-4:]]
    middle = [end - p * p / 2 for end, p in zip(pattern.ends, patch_nums)]
    axis.set_yticks(middle[-4:], last, fontsize=8)
    axis.set_xticks(middle[-4:], last, fontsize=8)
    axis.set_title(f"{len(patch_nums)} scales, {pattern.length} tokens", fontsize=10, loc="left")
    axis.set_xlabel("key")
    axis.set_ylabel("query")

# %% [markdown]
# ## 4. One transformer block
#
# A block is attention and an MLP, each modulated by the class $c$ (adaptive layer norm, VAR §4):
#
# $$\gamma_1, \gamma_2, \alpha_1, \alpha_2, \beta_1, \beta_2 = W \mathrm{silu}(c) + b$$
# $$x \leftarrow x + \gamma_1 \odot \mathrm{Attention}\big((1 + \alpha_1) \odot \mathrm{LN}(x) + \beta_1\big)$$
# $$x \leftarrow x + \gamma_2 \odot \mathrm{MLP}\big((1 + \alpha_2) \odot \mathrm{LN}(x) + \beta_2\big)$$
#
# Queries and keys are unit vectors, which keeps training stable; $\tau$ is learned for each head:
#
# $$\mathrm{Attention} = \mathrm{softmax}\big(e^{\tau}\, \hat q\, \hat k^{\top} + \text{mask}\big)\, v,
#   \qquad \hat q = q / \lVert q \rVert, \quad \hat k = k / \lVert k \rVert$$


# %%
def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def block(w, x, c, mask):
    # This model shares W and b among its blocks; a block has an offset of its own.
    gamma1, gamma2, alpha1, alpha2, beta1, beta2 = jnp.moveaxis(c + w.ada_offset[...], 1, 0)[
        :, :, None
    ]
    h = (1 + alpha1) * norm(x) + beta1
    q, k, v = jnp.einsum("BLD,DiHN->iBHLN", h, w.qkv[...])
    q, v = q + w.q_bias[...][:, None], v + w.v_bias[...][:, None]
    logits = jnp.exp(w.log_scale[...])[:, None, None] * (unit(q) @ unit(k).mT)
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf))
    h = jnp.einsum("BHLN,HND->BLD", weights @ v, w.proj[...]) + w.proj_bias[...]
    x = x + gamma1 * h
    h = (1 + alpha2) * norm(x) + beta2
    h = jax.nn.gelu(h @ w.fc1[...] + w.fc1_bias[...])
    return x + gamma2 * (h @ w.fc2[...] + w.fc2_bias[...]), weights


# %% [markdown]
# The first block alone, on random vectors: the equations give what the library's block gives.

# %%
pattern = Pattern.block_causal(model.patch_nums)


def block_of_library(w, x, c):
    return w(x, c, lambda q, k, v, query: (attention(q, k, v, pattern, **query), None))[0]


first = jax.tree.map(lambda stacked: stacked[0], transformer.blocks)
x = jax.random.normal(jax.random.key(0), (3, pattern.length, transformer.config.width))
c = transformer.block_cond(transformer.embed_labels(jnp.array([0, 4, 8])))
ours, theirs = (
    jax.jit(block)(first, x, c, pattern.mask())[0],
    jax.jit(block_of_library)(first, x, c),
)
print(f"up to {np.abs(theirs).max():.1f}, largest difference {np.abs(ours - theirs).max():.1e}")
np.testing.assert_allclose(ours, theirs, atol=1e-4 if ON_CPU else 1)

# %% [markdown]
# The whole transformer is an embedding, these blocks and a linear head:


# %%
@jax.jit
def run(transformer, quantizer, tokens, labels):
    c = transformer.embed_labels(labels)
    inputs = transformer.embed_inputs(quantizer.teacher_forcing_inputs(tokens))
    x = jnp.concatenate([transformer.embed_start(labels), inputs], axis=1)
    attentions = []
    for i in range(transformer.config.depth):
        w = jax.tree.map(lambda stacked, i=i: stacked[i], transformer.blocks)
        x, weights = block(w, x, transformer.block_cond(c), pattern.mask())
        attentions.append(weights)
    return transformer.head_out(x, c), jnp.stack(attentions)


labels = validation.labels[chosen]
logits, attentions = run(transformer, quantizer, tokens, labels)
theirs = transformer(labels, quantizer.teacher_forcing_inputs(tokens))
print(
    f"logits up to {np.abs(theirs).max():.1f}, largest difference {np.abs(logits - theirs).max():.1e}"
)
np.testing.assert_allclose(logits, theirs, atol=1e-3 if ON_CPU else 1)

# %% [markdown]
# ## 5. Attention to coarser scales
#
# How much of its attention a token of one scale (row) gives to the tokens of each other scale
# (column), by layer; the mean of heads and images. Rows sum to 1.

# %%
places = slices(model.patch_nums)
to_scale = jnp.stack([attentions[..., s].sum(-1) for s in places], axis=-1)  # layer B H L K
by_scale = jnp.stack([to_scale[:, :, :, s].mean((1, 2, 3)) for s in places], axis=1)

figure, axes = plt.subplots(1, len(by_scale), figsize=(12, 2.6), layout="constrained")
ticks = range(len(model.patch_nums)), model.patch_nums
for layer, axis in enumerate(axes):
    shown = axis.imshow(by_scale[layer], cmap="magma", vmin=0, vmax=0.6)
    axis.set_title(f"layer {layer + 1}", fontsize=10)
    axis.set_xticks(*ticks, fontsize=7)
    axis.set_yticks(*ticks, fontsize=7)
axes[0].set_ylabel("query, side of its scale")
axes[0].set_xlabel("key, side of its scale")
figure.colorbar(shown, ax=axes[-1], shrink=0.8)
plt.show()
# %% [markdown]
# Within the 4×4 scales: where a token of the last scale (white frame) looks in the scale before, the
# mean of all layers, heads and validation images. Most goes to the same place, and to its mirror
# image: many emoji are symmetric.

# %%
many = model.encode(validation.images[::4])
_, attentions = run(transformer, quantizer, many, validation.labels[::4])
last, before = places[-1], places[-2]
look = attentions[..., last, before].mean((0, 1, 2)).reshape(16, 4, 4)

figure, axes = plt.subplots(1, 6, figsize=(10, 1.9), layout="constrained")
for axis, place in zip(axes, [0, 3, 5, 10, 12, 15]):
    shown = axis.imshow(look[place], cmap="magma", vmin=0, vmax=look.max())
    y, x = divmod(place, 4)
    axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, color="white", lw=2))
    axis.set(xticks=[], yticks=[])
figure.colorbar(shown, ax=axes[-1], shrink=0.8)
plt.show()
# %% [markdown]
# ## 6. Sampling: guidance, top-k and top-p
#
# Guidance pushes the logits away from those without a class, and more so at finer scales:
#
# $$\ell = (1 + t_k)\, \ell_\text{class} - t_k\, \ell_\text{none}, \qquad t_k = \mathrm{cfg} \cdot \frac{k-1}{K-1}$$
#
# Top-k keeps the $k$ likeliest codes, top-p the likeliest that hold a share $p$ of the probability.
# Move the sliders and run the cell; 0 turns a setting off.

# %% {"cellView": "form"}
# @title Sample with your own settings
CLASS = "Travel & Places"  # @param ["Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects", "Symbols", "Flags"]
CFG = 1.5  # @param {"type": "slider", "min": 0, "max": 10, "step": 0.5}
TOP_K = 100  # @param {"type": "slider", "min": 0, "max": 1000, "step": 10}
TOP_P = 0.5  # @param {"type": "slider", "min": 0, "max": 1, "step": 0.05}
SEED = 0  # @param {"type": "integer"}
model.sample([CLASS] * 10, cfg=CFG, top_k=TOP_K, top_p=TOP_P, seed=SEED)

# %% [markdown]
# The same seeds under other settings. Guidance makes the class more typical, and too much of it breaks
# images: this checkpoint, trained long on few images, wants none. Filters trade variety for quality:
# with all codes some images fall apart, the likeliest code alone gives the same image again and again.

# %%
settings = {
    "no guidance": {"cfg": 0},
    "cfg 2": {"cfg": 2},
    "cfg 6": {"cfg": 6},
    "all codes": {"cfg": 0, "top_p": 0},
    "top-k 20": {"cfg": 0, "top_p": 0, "top_k": 20},
    "top-k 1": {"cfg": 0, "top_p": 0, "top_k": 1},
}
figure, axes = plt.subplots(len(settings), 1, figsize=(6, 3.6), layout="constrained")
for axis, (name, values) in zip(axes, settings.items()):
    samples = model.sample(["Food & Drink"] * 10, seed=0, **values)
    axis.imshow(np.concatenate(samples, axis=1))
    axis.set(xticks=[], yticks=[])
    axis.set_ylabel(name, rotation=0, ha="right", va="center")

# %% [markdown]
# Without top-k and top-p numbers, as in the first three rows, the checkpoint's own settings apply:

# %%
model.settings()

# %% [markdown]
# ## 7. The likelihood is exact
#
# VAR gives the probability of any image's tokens, scale by scale, so Bayes' rule turns it into a
# classifier: $p(c \mid r) \propto p(r \mid c)$ if all classes are equally likely. Here for a sample
# and three images of the validation set (orange is the right class). It is sure of its own samples. Of
# images that it has not seen it finds the class of 62 %, and is sometimes sure and wrong: it has
# memorized its training set.

# %%
chosen = [82, 122, 14]
images = [model.sample(["Flags"], seed=3)[0], *validation.images[chosen]]
labels = [8, *validation.labels[chosen]]
figure, axes = plt.subplots(
    2, 4, figsize=(10, 3.4), layout="constrained", height_ratios=(1, 3), sharey="row"
)
for (above, axis), image, label in zip(axes.T, images, labels):
    above.imshow(image)
    above.axis("off")
    each = model.log_likelihood(np.stack([image] * 9), np.arange(9)).sum(1)
    colors = ["tab:orange" if i == label else "lightsteelblue" for i in range(9)]
    axis.barh(model.class_names, jax.nn.softmax(each), color=colors)
    axis.set(xlim=(0, 1), xlabel="$p(c \\mid r)$")
axes[1, 0].invert_yaxis()

# %% [markdown]
# Next: [official weights](3_official_weights.ipynb), [your own images](4_your_own_images.ipynb),
# [TPU](5_tpu.ipynb), [scaling laws](6_scaling_laws.ipynb).
