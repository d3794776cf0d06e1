# %% [markdown]
# # Scaling laws
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/var_jax/blob/main/colab/6_scaling_laws.ipynb)
#
# [VAR](https://arxiv.org/abs/2404.02905) §5.2 reports that the test loss $L$ and the token error
# $Err$ fall as power laws of the number of parameters $N$ and of the training compute $C$. This
# notebook fits such laws to a ladder of models that was trained on Fashion-MNIST on a CPU:
#
# $$L(N) = E + A \, N^{-\alpha} = E + (\beta N)^{-\alpha}$$
#
# You can hold any size out and see how well the others predict it.

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

# %% [markdown]
# ## 1. The runs
#
# `benchmarks/ladder.py` trains the ladder of `configs/ladder.py`: depth is the one dial, the width
# is 32·depth, and all sizes see equally many images. `python -m var_jax.scaling` writes what the runs
# left to `runs.csv`, a row for each validation. For laws of your own runs, name your file here;
# without a name it is the one of the repository.

# %% {"cellView": "form"}
# @title Read runs.csv
RUNS = ""  # @param {"type": "string"}
import urllib.request

LADDER = "benchmarks/ladder/runs.csv"
URL = f"https://raw.githubusercontent.com/OWNER/var_jax/main/{LADDER}"
path = RUNS or f"../{LADDER}"
if not os.path.exists(path):
    path, _ = urllib.request.urlretrieve(RUNS or URL, "runs.csv")

# %%
import matplotlib.pyplot as plt
import numpy as np

from var_jax.evaluation.power_laws import PAPER, fit_power_law, interval
from var_jax.evaluation.scaling_report import best_rates, column, equal_data, law, numbers
from var_jax.evaluation.scaling_report import make_report, table
from var_jax.training.results import read_rows

plt.rcParams |= {"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False}
rows = best_rates(read_rows([path]))
final = equal_data(rows)  # the last validation of each run
print(f"{len(final)} runs, each of {final[0]['images']:,} images; {len(rows)} validations")
print(
    f"{'depth':>5} {'seed':>4} {'weights of the blocks':>21} {'TFLOPs':>7} {'loss':>6} {'error':>6}"
)
for row in final:
    print(
        f"{row['depth']:5} {row['seed']:4} {row['parameters']:21,} {row['compute'] / 1e12:7.2f}"
        f" {row['loss_all']:6.3f} {row['error_all']:6.3f}"
    )

# %% [markdown]
# $N$ counts the weights of the blocks, as the paper does. Compute is forward and backward, in the
# blocks, their attention, and the head.
#
# ## 2. How loss falls in training
#
# Validation loss of each run, against the compute spent so far. The lower envelope of such curves is
# the least loss for a budget.

# %%
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
sizes = sorted({row["parameters"] for row in rows})
for run in dict.fromkeys(row["run"] for row in rows):
    of_run = [row for row in rows if row["run"] == run]
    color = plt.cm.viridis(0.9 * sizes.index(of_run[0]["parameters"]) / max(len(sizes) - 1, 1))
    axis.plot(column(of_run, "compute"), column(of_run, "loss_all"), "o-", ms=3, lw=1, color=color)
axis.set(xscale="log", xlabel="operations of training", ylabel="loss, nats a token")
axis.set_title("dark: small, light: large", loc="left", fontsize=10)
plt.show()
# %% [markdown]
# ## 3. Loss as a power law of parameters
#
# Only the exponent $\alpha$ is searched. For a given $\alpha$, the irreducible loss $E$ and $A$ are a
# non-negative least-squares problem (variable projection), so $E$ is fitted and not subtracted by
# hand. Errors are relative.

# %%
N = column(final, "parameters") / 1e9
for metric in ("loss_last", "loss_all"):
    y = column(final, metric)
    fit = fit_power_law(N, y)
    E, A, alpha = fit.E[0], fit.A[0], fit.alpha[0]
    residual = np.abs(fit(N)[0] / y - 1).max()
    print(f"{metric}: {E:.3f} + {A:.4g}·N^-{alpha:.3f}, largest residual {100 * residual:.2f} %")

# %% [markdown]
# ### How sure are the constants?
#
# Runs are drawn with replacement a thousand times (bootstrap), and each resample is fitted. The
# intervals are of 90 %, widened for few runs. Paper: the constants of VAR §5.2, of ImageNet and much
# larger models, where $E$ was subtracted; an exponent is a property of data, tokens and training, so
# there is no reason that ours should agree.

# %%
report = make_report(rows)
span = lambda ends: f"{ends[0]:.3g} to {ends[1]:.3g}" if ends else "too few runs"
print(f"{'':10} {'E':>8} {'90 %':>20} {'α':>8} {'90 %':>20} {'paper α':>8}")
for metric, each in report.of_size.items():
    cells = []
    for name in ("E", "alpha"):
        ends = interval(getattr(each.resamples, name), each.runs)
        cells.append(f"{getattr(each.fit, name)[0]:8.3f} {span(ends):>20}")
    print(f"{metric:10} {' '.join(cells)} {PAPER[metric][1]:8}")

# %% [markdown]
# ## 4. Move the held-out point
#
# The law is fitted without one size, and then predicts it. Predicting the largest from the smaller
# ones is the use that a law has; a size in the middle is easier. Move the slider and run the cell:
# 1 is the smallest size.

# %% {"cellView": "form"}
# @title Hold out a size
HELD_OUT = 6  # @param {"type": "slider", "min": 1, "max": 6, "step": 1}
METRIC = "loss_all"  # @param ["loss_all", "loss_last", "error_all", "error_last"]
size = np.unique(N)[min(HELD_OUT, len(np.unique(N))) - 1]
held_out, y = np.isin(N, size), column(final, METRIC)
others = ~held_out
rest = law(N[others], y[others], numbers(final)[others])
point = np.array([size])
predicted, observed = rest.fit(point)[0, 0], y[held_out].mean()
ends = interval(rest.resamples(point)[:, 0], rest.runs)

figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
x = np.geomspace(N.min() / 1.3, N.max() * 1.3)
curves = rest.resamples(x)
axis.fill_between(x, *np.quantile(curves, (0.05, 0.95), axis=0), color="0.9", label="resamples")
axis.plot(x, rest.fit(x)[0], color="tab:blue", label="law of the other sizes")
axis.plot(N[others], y[others], "o", ms=4, color="tab:blue")
axis.plot(N[held_out], y[held_out], "o", ms=7, color="tab:orange", label="held out")
axis.set(xscale="log", xlabel="weights of the blocks, billions", ylabel=METRIC)
axis.legend(frameon=False)
print(
    f"observed {observed:.4f}, predicted {predicted:.4f} (90 %: {span(ends)}),"
    f" residual {100 * (observed / predicted - 1):+.2f} %"
)

# %% [markdown]
# ## 5. The best size for a budget
#
# With compute fixed, a small model sees many images and a large one few. Each curve is one budget
# (isoFLOP): of runs that were trained with it from the start, or, where there are none, of runs on
# their way. Where a parabola has its minimum inside the sizes, that is the best size; where curves only
# fall or rise, the best size lies outside of them.

# %%
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
for each in report.iso_flops:
    axis.plot(each.N, each.loss, "o-", ms=3, lw=1, label=f"{each.budget / 1e12:.2f} TFLOPs")
    if each.best:
        axis.axvline(each.best, color="0.8", lw=0.8, zorder=0)
axis.set(xscale="log", xlabel="weights of the blocks", ylabel="loss_all")
axis.legend(frameon=False, fontsize=7, ncols=2)
plt.show()
# %% [markdown]
# ## 6. Everything that the command prints
#
# `python -m var_jax.scaling --runs runs.csv` also fits the laws of compute and the surface
# $L(N, D) = E + A N^{-\alpha} + B D^{-\beta}$ over images $D$:

# %%
print(table(report))

# %% [markdown]
# The ladder again, or one of yours:
#
#     python benchmarks/ladder.py --out runs/ladder
#     python -m var_jax.scaling --runs runs/ladder --out runs/ladder/laws
#
# Back to [how VAR works](2_how_var_works.ipynb).
