"""The scaling laws of a set of runs: fitted, drawn beside the points, and printed for people."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from var_jax import BadInput
from var_jax.evaluation.power_laws import (
    FEWEST,
    OF_SURFACE,
    PAPER,
    PAPER_OF_COMPUTE,
    RESAMPLES,
    IsoFlop,
    PowerLaw,
    Surface,
    fit_power_law,
    fit_surface,
    frontier,
    interval,
    iso_flop,
    parabola,
    resample,
)
from var_jax.tools.images import charts, save_charts

PUBLISHED = {"N": PAPER, "C": PAPER_OF_COMPUTE}
METRICS = ("loss_last", "loss_all", "error_last", "error_all")
BILLION, TERA, PETA = 1e9, 1e12, 1e15
WEIGHTS = "weights of the blocks, billions"
BUDGETS = 16
POINTS = "points of L(C) and L(N, D)"
NOTES = """\
VAR §5.2 (arXiv 2404.02905) contradicts itself. It subtracts irreducible losses of 4.5 and 5 instead
of fitting them; by its laws, the log of the released d16 (5.345 at the last scale, 6.046 over all,
after 200 epochs, N = 0.302) leaves 4.22 and 4.99. It gives one learning rate, 1e-4, for all sizes;
the commands of its release take 8e-5 from d24 on. By its laws of N the error is lower at the last
scale than over all (0.90 and 0.93 at N = 2), by those of C higher (0.93 and 0.89 at C = 1e6), as if
these were swapped. An epoch has 870 billion tokens, but 350 epochs have 305 billion. The model
of depth 6 has 18.5 M weights, but 15.9 M by the formula for N. Markov-VAR (arXiv 2511.23334)
reports such laws from 19.8 M to 1.02 B parameters; its constants were not at hand."""


class Law(NamedTuple):
    """A law, its resamples, and the points that it is fitted to."""

    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    runs: int
    fit: PowerLaw
    resamples: PowerLaw

    def estimates(self) -> dict[str, dict[str, Any]]:
        """E, A, α and β, each with its interval."""
        names = ("E", "A", "alpha", "beta")
        value = lambda name: (float(getattr(self.fit, name)[0]), getattr(self.resamples, name))
        return {name: estimate(*value(name), self.runs) for name in names}

    def correlation(self) -> float | None:
        """Pearson's, of log(y - E) and log x; of points above the irreducible loss."""
        above = self.y > self.fit.E[0]
        if above.sum() < FEWEST or np.ptp(self.x[above]) == 0:
            return None
        excess = np.log(self.y[above] - self.fit.E[0])
        return float(np.corrcoef(np.log(self.x[above]), excess)[0, 1])


class Report(NamedTuple):
    """The laws of each metric, over parameters (in billions) and compute (in PFLOPs)."""

    of_size: dict[str, Law]
    of_compute: dict[str, Law]
    held_out: dict[str, dict[str, Any]]  # of the largest size, predicted from the others
    residuals: dict[str, tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]
    surface: dict[str, Any] | None
    iso_flops: list[IsoFlop]
    curves: dict[str, dict[str, tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]]]
    about: dict[str, Any]


def make_report(rows: Sequence[dict[str, Any]]) -> Report:
    """Fits everything. Raises: BadInput if fewer than three sizes saw equally many images."""
    rows = best_rates(rows)
    final = equal_data(rows)
    N = column(final, "parameters") / BILLION
    ended = whole_schedules(rows)
    points = ended or rows
    C = column(points, "compute") / PETA
    of_size, of_compute, held_out, residuals = {}, {}, {}, {}
    for metric in METRICS:
        of_size[metric] = law(N, column(final, metric), numbers(final))
        of_compute[metric] = frontier_law(C, column(points, metric), numbers(points))
        if len(np.unique(N)) > FEWEST:
            held_out[metric], residuals[metric] = predict_largest(of_size[metric], final)
    about = {
        "runs": len({row["run"] for row in rows}),
        "runs of equal data": len(final),
        "images": int(final[0]["images"]),
        "sizes": sorted({int(row["parameters"]) for row in final}),
        POINTS: "ends of runs" if ended else "all validations",
        "learning_rates": {str(row["parameters"]): row["learning_rate"] for row in final},
    }
    curves = {metric: curves_of(rows, metric) for metric in METRICS}
    surface, iso_flops = surface_of(points), budgets_of(rows)
    return Report(of_size, of_compute, held_out, residuals, surface, iso_flops, curves, about)


def column(rows: Iterable[dict[str, Any]], name: str) -> Float[np.ndarray, " n"]:
    """A column as numbers."""
    return np.array([row[name] for row in rows], float)


def numbers(rows: Sequence[dict[str, Any]]) -> Int[np.ndarray, " n"]:
    """Of which run each row is, counted from 0."""
    return np.unique([row["run"] for row in rows], return_inverse=True)[1]


def best_rates(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, of runs that differ in the learning rate alone those of the best one."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["step"] == row["steps"]:
            key = row["variant"]
            if key not in best or row["loss_all"] < best[key]["loss_all"]:
                best[key] = row
    kept = {row["run"] for row in best.values()}
    for run, rate in {row["run"]: row["learning_rate"] for row in rows}.items():
        if run not in kept:
            print(f"{run}: left out, another rate than {rate:.3g} is better", file=sys.stderr)
    return [row for row in rows if row["run"] in kept]


def last_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row with which each run ended."""
    return [row for row in rows if row["step"] == row["steps"]]


def equal_data(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last rows of runs over equally many images: as many as the most sizes have seen.

    Of numbers of images that equally many sizes have seen, the largest. Raises: BadInput if there
    are no three such sizes.
    """
    final = last_rows(rows)
    seen: dict[int, set[int]] = {}
    for row in final:
        seen.setdefault(row["images"], set()).add(row["parameters"])
    sizes_of = lambda images: len(seen[images])
    images = max(seen, key=lambda images: (sizes_of(images), images), default=0)
    if seen and sizes_of(images) >= FEWEST:
        return [row for row in final if row["images"] == images]
    sizes = ", ".join(f"{n:,}" for n in sorted({row["parameters"] for row in final}))
    raise BadInput(
        f"--runs: a law needs {FEWEST} sizes trained on equally many images; found sizes of"
        f" {sizes or 'no'} parameters."
    )


def law(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], runs: Int[np.ndarray, " n"]) -> Law:
    """A law of all points."""
    weights = resample(runs, x, RESAMPLES)
    return Law(x, y, len(np.unique(runs)), fit_power_law(x, y), fit_power_law(x, y, weights))


def whole_schedules(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ends of the runs, if at three budgets three sizes ended; else none.

    On its way a run has not lowered its learning rate yet: its loss is not the least that its
    compute can buy.
    """
    return last_rows(rows) if len(equal_compute(rows)) >= FEWEST else []


def budgets(compute: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The budget of each point: the least compute of those within 2 % of each other."""
    found: list[float] = []
    for value in np.unique(compute):
        if not found or value >= 1.02 * found[-1]:
            found.append(value)
    return np.array(found)[np.searchsorted(found, compute, side="right") - 1]


def frontier_law(
    compute: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], runs: Int[np.ndarray, " n"]
) -> Law:
    """A law of the least loss for each budget, whichever run has it."""
    compute = budgets(compute)
    front = frontier(compute, y, np.ones((1, len(y))))
    weights = resample(runs, compute, RESAMPLES)
    weights = weights * frontier(compute, y, weights)
    weights = weights[(weights > 0).sum(axis=1) >= FEWEST]
    fit = fit_power_law(compute, y, front.astype(float))
    every = fit_power_law(compute, y, weights)
    return Law(compute[front[0]], y[front[0]], len(np.unique(runs[front[0]])), fit, every)


def predict_largest(
    whole: Law, final: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
    """The largest size from a law of the others; and the residuals of all in percent."""
    largest = whole.x.max()
    others = whole.x < largest
    rest = law(whole.x[others], whole.y[others], numbers(final)[others])
    point = np.array([largest])
    seen = float(whole.y[~others].mean())
    found = estimate(float(rest.fit(point)[0, 0]), rest.resamples(point)[:, 0], rest.runs)
    percent = 100 * (whole.y / rest.fit(whole.x)[0] - 1)
    about = {"parameters": largest * BILLION, "observed": seen, "predicted": found}
    about["residual, percent"] = 100 * (seen / found["value"] - 1)
    return about, (whole.x, percent)


def surface_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """E + A·N^-α + B·D^-β of the loss over all scales; None for fewer than six points.

    N in billions, D in millions of images.
    """
    N, D = column(rows, "parameters") / BILLION, column(rows, "images") / 1e6
    if len(rows) <= len(Surface._fields) or len(np.unique(D)) < FEWEST:
        return None
    loss, runs = column(rows, "loss_all"), numbers(rows)
    fit = fit_surface(N, D, loss)
    every = fit_surface(N, D, loss, resample(runs, N, OF_SURFACE))
    counts = len(np.unique(runs)), len(Surface._fields)
    names = (*Surface._fields, "growth")
    return {
        name: estimate(float(getattr(fit, name)[0]), getattr(every, name), *counts)
        for name in names
    }


def budgets_of(rows: Sequence[dict[str, Any]]) -> list[IsoFlop]:
    """isoFLOP curves of the loss over all scales.

    At the budgets with which three sizes ended; if there are none, between validations of the runs,
    whose learning rate had not fallen yet.
    """
    if ended := equal_compute(rows):
        return ended
    found: dict[float, tuple] = {}
    for size in {row["parameters"] for row in rows}:
        of_size = [row for row in rows if row["parameters"] == size]
        C = np.unique(column(of_size, "compute"))
        loss = [np.mean([row["loss_all"] for row in of_size if row["compute"] == c]) for c in C]
        found[float(size)] = C, np.array(loss)
    C = column(rows, "compute")
    return iso_flop(found, np.geomspace(C.min(), C.max(), BUDGETS))


def equal_compute(rows: Sequence[dict[str, Any]]) -> list[IsoFlop]:
    """The curve of each budget with which runs of three sizes ended, give or take 2 %."""
    final = last_rows(rows)
    of_row, found = budgets(column(final, "compute")), []
    for budget in np.unique(of_row):
        group = [row for row, its in zip(final, of_row, strict=True) if its == budget]
        sizes = np.unique(column(group, "parameters"))
        of_size = [[row["loss_all"] for row in group if row["parameters"] == n] for n in sizes]
        if len(sizes) >= FEWEST:
            found.append(parabola(float(budget), sizes, np.array([*map(np.mean, of_size)])))
    return found


def curves_of(
    rows: Sequence[dict[str, Any]], metric: str
) -> dict[str, tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]]:
    """Compute and metric of each run as it trained."""
    of_run = {name: [r for r in rows if r["run"] == name] for name in {r["run"] for r in rows}}
    return {name: (column(of, "compute") / PETA, column(of, metric)) for name, of in of_run.items()}


def estimate(
    value: float, samples: Float[np.ndarray, " B"], runs: int, unknowns: int = 3
) -> dict[str, Any]:
    """A number with its interval, for fit.json; None for what is not finite."""
    ends = interval(samples, runs, unknowns)
    plain = lambda x: float(x) if np.isfinite(x) else None
    return {"value": plain(value), "interval": [plain(end) for end in ends] if ends else None}


def summary(report: Report) -> dict[str, Any]:
    """What fit.json holds."""
    laws = {"N": report.of_size, "C": report.of_compute}
    best = np.log([(b.budget, b.best) for b in report.iso_flops if b.best])
    slope = np.polyfit(best[:, 0], best[:, 1], 1)[0] if len(best) > 1 else None
    return {
        "form": "E + A·x^-alpha = E + (beta·x)^-alpha; N in billions of weights of the blocks, C in"
        " PFLOPs (1e15) of training, D in millions of images; intervals of 90 %",
        **report.about,
        "laws": {
            f"{metric}({variable})": law.estimates() | {"correlation": law.correlation()}
            for variable, found in laws.items()
            for metric, law in found.items()
        },
        "largest, held out": report.held_out,
        "loss_all(N, D)": report.surface,
        "isoFLOP": {
            "growth of the best N, by parabolas": None if slope is None else float(slope),
            "budgets": [
                {"PFLOPs": b.budget / PETA, "N": (b.N / BILLION).tolist(), "loss": b.loss.tolist()}
                | {"best N": b.best and b.best / BILLION}
                for b in report.iso_flops
            ],
        },
        "published": {
            "VAR §5.2": {
                f"{metric}({variable})": {"beta": beta, "alpha": alpha}
                for variable, found in PUBLISHED.items()
                for metric, (beta, alpha) in found.items()
            }
        },
    }


def draw(report: Report, path: str | PurePath) -> None:
    """Writes the figure: laws of size and compute, residuals, isoFLOP curves."""
    figure, axes = charts(6)
    names = {"loss": ("loss_last", "loss_all"), "error": ("error_last", "error_all")}
    for axis, (kind, metrics) in zip(axes, names.items(), strict=False):
        draw_laws(axis, "N", {name: report.of_size[name] for name in metrics})
        axis.set(title=f"{kind}(N)", xlabel=WEIGHTS, xscale="log")
    for axis, (kind, metrics) in zip(axes[3:], names.items(), strict=False):
        for curve in (c for name in metrics for c in report.curves[name].values()):
            axis.plot(*curve, color="0.8", linewidth=0.8, zorder=0)
        draw_laws(axis, "C", {name: report.of_compute[name] for name in metrics})
        axis.set(title=f"{kind}(C), least for each C", xlabel="PFLOPs of training", xscale="log")
    for name, (x, percent) in report.residuals.items():
        axes[2].plot(x, percent, "o", ms=3.5, label=name)
        axes[2].plot(x[x == x.max()], percent[x == x.max()], "o", ms=9, mfc="none", color="0.3")
    axes[2].axhline(0, color="0.7", linewidth=0.8)
    axes[2].set(title="measured / law - 1, %; the largest held out", xlabel=WEIGHTS, xscale="log")
    for each in report.iso_flops:
        label = f"{each.budget / TERA:.2g} TFLOPs"
        points = axes[5].plot(each.N / BILLION, each.loss, "o", ms=3.5, label=label)
        N = np.geomspace(each.N[0], each.N[-1])
        color = points[0].get_color()
        axes[5].plot(N / BILLION, np.polyval(each.parabola, np.log(N)), color=color, linewidth=1)
    axes[5].set(title="isoFLOP: loss_all at equal C", xlabel=WEIGHTS, xscale="log")
    low, high = axes[5].get_ylim()
    axes[5].set_ylim(low, high + 0.45 * (high - low))  # room for the legend
    save_charts(path, figure, axes)


def draw_laws(axis: Any, variable: str, laws: dict[str, Law]) -> None:
    """Points and fitted laws, with their formulas."""
    for name, each in laws.items():
        points = axis.plot(each.x, each.y, "o", ms=3.5)
        x = np.geomspace(each.x.min(), each.x.max())
        E, A, alpha = (values[0] for values in each.fit)
        label = f"{name}: {E:.3g} + {A:.3g}·${variable}^{{-{alpha:.3g}}}$"
        axis.plot(x, each.fit(x)[0], color=points[0].get_color(), linewidth=1.4, label=label)


def table(report: Report) -> str:
    """What the command prints: our constants, and beside them those that are published."""
    show = lambda e: f"{e['value']:.3g} [{span(e['interval'])}]" if e["value"] is not None else "-"
    lines = [f"{'law':15s}{'E (irreducible)':26s}{'alpha':26s}{'beta':11s}correlation"]
    for variable, laws in (("N", report.of_size), ("C", report.of_compute)):
        for metric, each in laws.items():
            found, r = each.estimates(), each.correlation()
            beta = found["beta"]["value"]
            cells = (show(found["E"]), show(found["alpha"]))
            text = "".join(f"{cell:26s}" for cell in cells) + f"{beta or np.nan:<11.3g}"
            lines.append(f"{metric}({variable})".ljust(15) + text + (f"{r:.4f}" if r else "-"))
            paper_beta, paper_alpha = PUBLISHED[variable][metric]
            lines.append(f"{'  VAR §5.2':15s}{'subtracted':26s}{paper_alpha:<26g}{paper_beta:g}")
    lines.append(f"L(C) and L(N, D) are fitted to: {report.about[POINTS]}")
    for metric, each in report.held_out.items():
        predicted = each["predicted"]
        lines.append(
            f"largest, held out: {metric} {each['observed']:.4f}, predicted {show(predicted)},"
            f" residual {each['residual, percent']:+.2f} %"
        )
    if report.surface:
        cells = [f"{name} {show(report.surface[name])}" for name in report.surface]
        lines.append("loss_all(N, D) = E + A·N^-alpha + B·D^-beta: " + ", ".join(cells))
    return "\n".join([*lines, NOTES])


def span(ends: list[float | None] | None) -> str:
    """An interval as text."""
    return " to ".join("inf" if end is None else f"{end:.3g}" for end in ends) if ends else "?"
