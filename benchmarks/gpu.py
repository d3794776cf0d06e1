"""One table of an NVIDIA GPU: correctness, then training, sampling and codec beside PyTorch.

    pip install -e '.[cuda12,hub]' torch
    git clone https://github.com/FoundationVision/VAR
    python benchmarks/gpu.py --reference VAR [--minutes 7] [--out benchmarks/gpu.json]

A part is a process of its own, in which ours and the release's program run in turn: as published
(eager) and under torch.compile, except sampling, whose cache grows in every pass. Of d30 the two do
not fit one card together, and are parts of their own. Figures are medians over the rounds. Every
part is saved as it ends, under the device, versions and settings it was measured with: a second
start measures only what is missing, then once more what failed; a part that would pass --minutes
waits for it. Without --reference, or without what the release imports (torch, huggingface_hub),
only our columns are filled; what does not run is a dash. GB are what a program needs while it runs:
ours by its compiler, PyTorch's by its allocator. `--small` is for trying the script on a CPU: tiny
models, and no figure that means anything. `--minutes 0` prints the rows that there are.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

Run = Callable[[], object]
ROOT = pathlib.Path(__file__).resolve().parents[1]
ROUNDS = 5
PARTS = (  # what most people ask first comes first
    "check", "train d16", "sample d16", "train d30 ours", "train d30 release",
    "sample d30 ours", "sample d30 release", "codec", "presets",
)  # fmt: skip
ESTIMATE = 75  # seconds of a part that has not run yet
RATE, LATENCY = "images/s", "ms an image"  # units
# Images of a training step. Of d16 a PyTorch step needs 0.8 GB an image, of d30 2.9 and 36 more.
BATCH = {"d16": 32, "d30": 8}
# Of the attention that is checked: 680 tokens, and 85, an odd number that cuDNN has to have padded.
PATTERNS = ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 4, 8))


class Program(NamedTuple):
    """What is timed, and the GB it needs, which are asked for after a first run."""

    run: Run
    memory: Callable[[], float | None] = lambda: None


def main() -> None:
    """Runs the parts that are missing, then prints the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--reference", help="a clone of the PyTorch release")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", choices=("about", *PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure(args.part, args.reference, args.small)))
        return
    saved = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.minutes <= 0:
        print("\n\n".join(table(*found) for found in saved.items()) or table("", {}))
        return
    ends = time.monotonic() + 60 * args.minutes
    left = lambda: ends - time.monotonic()
    here = start("about", args.reference, args.small, left())
    if "failed" in here:
        sys.exit(f"there is nothing to measure on: {here['failed']}")
    done = saved.setdefault(here["about"], {})
    for part in due(done):
        if left() < ESTIMATE and not args.small:
            message = f"{part}: not measured, {max(left(), 0):.0f} s are left; start again"
            print(message, file=sys.stderr)
            continue
        done[part] = start(part, args.reference, args.small, None if args.small else left())
        beside = args.out.with_suffix(".part")
        beside.write_text(json.dumps(saved, indent=1) + "\n")
        beside.replace(args.out)
    print(table(here["about"], done))


def due(done: dict[str, dict[str, Any]]) -> list[str]:
    """The parts to run: what fails each time comes last, lest it take all the minutes."""
    failed = [part for part in PARTS if "failed" in done.get(part, {})]
    return [part for part in PARTS if part not in done] + failed


def start(part: str, reference: str | None, small: bool, seconds: float | None) -> dict[str, Any]:
    """The figures of a part, or in one sentence why there are none."""
    command = [sys.executable, __file__, "--part", part]
    command += ["--reference", reference] if reference else []
    command += ["--small"] if small else []
    began = time.monotonic()
    print(f"{part} ...", file=sys.stderr, flush=True)
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # room for torch
    try:
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {seconds:.0f} s"}
    if ended.returncode:
        return {"failed": f"exit code {ended.returncode}; the reason is above"}
    return json.loads(ended.stdout.splitlines()[-1]) | {"seconds": time.monotonic() - began}


def table(about: str, done: dict[str, dict[str, Any]]) -> str:
    """All rows in Markdown, under what they were measured on."""
    lines = [f"{about}\n"] if about else []
    lines += ["| | | ours | MFU | GB | eager | GB | compiled | GB | times eager |"]
    lines += ["|---|" + "---|" * 9]
    rows: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        for name, row in done.get(part, {}).get("rows", {}).items():
            rows[name] = merged(rows.get(name, {}), row)
    lines += [line(name, row) for name, row in rows.items()]
    for part in PARTS:
        if part not in done or "failed" in done[part]:
            reason = f" ({done[part]['failed']})" if part in done else ""
            lines.append(f"| {part} | not measured{reason} |" + " |" * 8)
        for name, text in done.get(part, {}).get("checks", {}).items():
            lines.append(f"| {name} | {text} |" + " |" * 8)
    return "\n".join(lines)


def merged(row: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """One row of two: of d30, ours and the release's are measured apart."""
    return {**row, **more, "memory": row.get("memory", {}) | more.get("memory", {})}


def line(name: str, row: dict[str, Any]) -> str:
    """A row in Markdown; more than one in its last cell is ours being faster."""
    cells = [row.get("unit"), row.get("ours"), row.get("mfu"), row["memory"].get("ours")]
    for program in ("eager", "compiled"):
        cells += [row.get(program), row["memory"].get(program)]
    ours, eager = row.get("ours"), row.get("eager")
    if isinstance(ours, float) and isinstance(eager, float):
        cells.append(eager / ours if row.get("unit") == LATENCY else ours / eager)
    else:
        cells.append(None)
    return f"| {name} | " + " | ".join(map(shown, cells)) + " |"


def shown(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def measure(part: str, reference: str | None, small: bool) -> dict[str, Any]:
    """The rows of one part, measured in this process."""
    import jax

    device = jax.devices()[0]
    versions = f"jax {jax.__version__}, Python {sys.version.split()[0]}"
    release = None
    if reference:
        try:
            import torch  # type: ignore[import-not-found]

            versions += f", torch {torch.__version__}"
            release = Release(reference)
        except ImportError as error:
            print(f"only ours is measured: {error}", file=sys.stderr)
    if part == "about":
        means = [device.device_kind, versions, "" if release else "without the release"]
        return {"about": ", ".join(filter(None, [*means, "small models" if small else ""]))}
    kind, name, side, *_ = [*part.split(), "", ""]
    if kind == "check":
        return {"checks": check()}
    if side == "release" and not release:
        return {"rows": {}}
    if side == "ours":
        release = None
    rows = {"train": train, "sample": draw, "codec": codec, "presets": presets}[kind]
    return {"rows": rows(name, release, small, **({"ours": False} if side == "release" else {}))}


def compare(
    images: int, programs: dict[str, Program], flops: float = 0.0, latency: bool = False
) -> dict[str, Any]:
    """One row: the figures of programs that run in turn; `flops` are of one image."""
    import jax

    from var_jax.tools.flops import peak_flops

    row: dict[str, Any] = {"unit": LATENCY if latency else RATE, "memory": {}}
    ready = {}
    for name, program in programs.items():
        try:
            program.run()
            ready[name] = program.run
            row["memory"][name] = program.memory()
        except Exception as error:  # out of memory, or what torch.compile cannot take
            if name not in ready:
                row[name] = "—"
            tell(name, error)
    times: dict[str, list[float]] = {name: [] for name in ready}
    try:
        for _ in range(ROUNDS):
            for name, run in ready.items():
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
    except Exception as error:
        tell("a later round", error)
    seconds = {name: statistics.median(taken) / images for name, taken in times.items() if taken}
    row |= {name: 1000 * each if latency else 1 / each for name, each in seconds.items()}
    peak = peak_flops(jax.devices()[0].device_kind)
    if flops and peak and "ours" in seconds:
        row["mfu"] = flops / seconds["ours"] / peak
    return row


def tell(name: str, error: Exception) -> None:
    """One line that says why something is not measured."""
    print(f"{name}: {[*str(error).splitlines(), repr(error)][0][:120]}", file=sys.stderr)


def theirs_of(release: "Release | None", task: str, *args: Any) -> dict[str, Any]:
    """The release's programs of a task; none where it cannot be built."""
    try:
        return getattr(release, task)(*args) if release else {}
    except Exception as error:
        tell(f"the release's {task}", error)
        return {}


def tidy(release: "Release | None") -> None:
    """Gives the memory of the row before back, between rows and not within their rounds.

    There PyTorch would have to allocate it again, at its cost.
    """
    import jax

    gc.collect()
    jax.clear_caches()
    if release:
        release.tidy()


def config_of(name: str, small: bool):
    """The experiment that is measured: ImageNet's, or emoji's to try the script."""
    from var_jax.config import Config, from_dict
    from var_jax.tools.configs import load_config

    fields = ["transformer.num_classes=10"]
    if small:
        config = load_config("emoji", fields)
    else:
        config = load_config(name if name in ("emoji", "fashion") else f"imagenet:{name}", fields)
    return from_dict(Config, config)


# Correctness


def check() -> dict[str, str]:
    """The golden cases on this device, and the attention that runs here."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    sys.path.insert(0, str(ROOT / "tests"))
    from golden_cases import CASES, models  # type: ignore[import-not-found]

    from var_jax.models.tokenizer import Tokenizer

    found = {}
    with jax.default_matmul_precision("highest"):
        for case in CASES:
            tokenizer, transformer, gold = models(case)
            tokens = jax.jit(Tokenizer.encode)(tokenizer, jnp.moveaxis(gold["image"], -3, -1))
            labels, inputs = map(jnp.asarray, (gold["labels"], gold["teacher_forcing_input"]))
            logits = jax.jit(transformer.__call__)(labels, inputs)
            equal = (np.asarray(tokens) == gold["tokens"]).mean()
            off = np.abs(np.asarray(logits) - gold["logits"]).max()
            verdict = "" if equal > 0.99 and off < 0.01 else "WRONG: "
            found[f"golden case {case}"] = (
                f"{verdict}{100 * equal:.4g} % of tokens, logits within {off:.1g}"
            )
    for sides in PATTERNS:
        name, verdict = check_attention(sides)
        found[name] = verdict
    return found


def check_attention(sides: tuple[int, ...]) -> tuple[str, str]:
    """The attention that runs here against the masked one, with gradients, in bfloat16."""
    import jax
    import jax.numpy as jnp

    from var_jax.models.attention import attention, choose
    from var_jax.schedule import Pattern

    pattern = Pattern.block_causal(sides)
    keys, shape = jax.random.split(jax.random.key(0), 4), (2, pattern.length, 4, 64)
    q, k, v, weight = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    scale = jnp.full((4,), 4.0)

    def loss(qkv, implementation):
        q, k, v = qkv
        out = attention(
            q, k, v, pattern, scale=scale, qk_norm=True, implementation=implementation
        ).astype(jnp.float32)
        return (out * weight.astype(jnp.float32)).sum(), out

    chosen, results = choose(q.dtype, q.shape[-1]), []
    for implementation in (chosen, "masked"):
        run = jax.jit(
            jax.grad(functools.partial(loss, implementation=implementation), has_aux=True)
        )
        gradient, out = run((q, k, v))
        results.append([out, *(g.astype(jnp.float32) for g in gradient)])
    off = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(*results, strict=True))
    verdict = "" if off < 0.05 else "WRONG: "
    name = f"attention {chosen} against masked, {pattern.length} tokens"
    return name, f"{verdict}values and gradients within {off:.1g}"


# Ours


def compiled(build: Callable[[], tuple[Any, Run]]) -> Program:
    """What `build` compiles, a program and what runs it, at the first run: it may not fit."""
    held: list[Any] = []

    def run() -> None:
        if not held:
            held.extend(build())
        held[1]()

    def memory() -> float:
        of = held[0].memory_analysis()
        kept = of.argument_size_in_bytes + of.output_size_in_bytes - of.alias_size_in_bytes
        return (kept + of.temp_size_in_bytes) / 1e9

    return Program(run, memory)


def call(function: Any, *args: Any) -> Program:
    """A jitted function of these arguments."""
    import jax

    def build():
        program = function.lower(*args).compile()
        return program, lambda: jax.block_until_ready(program(*args))

    return compiled(build)


def train(
    name: str, release: "Release | None", small: bool, ours: bool = True
) -> dict[str, dict[str, Any]]:
    """A training step of d16 or d30 in bfloat16, on tokens and on pixels."""
    from var_jax.training.aot import model_flops

    config, images, rows = config_of(name, small), 2 if small else BATCH[name], {}
    for program in ("transformer", "pixels"):
        pixels = program == "pixels"
        row = f"{name}, train on {'pixels' if pixels else 'tokens'}, {images} images"
        rows[row] = compare(
            images,
            ({"ours": training_step(config, images, program)} if ours else {})
            | theirs_of(release, "training", config, images, pixels),
            model_flops(config, program),
        )
        tidy(release)
    return rows


def training_step(config: Any, images: int, program: str) -> Program:
    """A step of the training that `program` is of; it keeps its own state."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from var_jax.training.tasks import task_of

    rng, c, side = np.random.default_rng(0), config.transformer, config.data.size
    batch = {"label": jnp.asarray(rng.integers(0, c.num_classes, images).astype(np.int32))}
    if program == "transformer":
        tokens = rng.integers(0, c.vocab_size, (images, c.num_tokens))
        batch["tokens"] = jnp.asarray(tokens.astype(np.int32))
    else:
        pixels = rng.integers(0, 256, (images, side, side, 3))
        batch["image"] = jnp.asarray(pixels.astype(np.uint8))
    task = task_of(config, program)
    frozen = {} if program == "tokenizer" else {"tokenizer": tokenizer_of(config)}

    def build():
        state = [jax.jit(task.init)(jax.random.key(0)), jnp.zeros((), jnp.int32)]
        more = batch, frozen, jax.random.key(1)
        step = jax.jit(task.step, donate_argnums=0).lower(*state, *more).compile()

        def run() -> None:
            state[0], state[1], metrics = step(*state, *more)
            jax.block_until_ready(metrics)

        return step, run

    return compiled(build)


def tokenizer_of(config: Any) -> Any:
    """The config's tokenizer with random weights."""
    import jax
    from flax import nnx

    from var_jax.models.patch_codec import make_tokenizer

    return jax.jit(lambda: make_tokenizer(config.tokenizer, rngs=nnx.Rngs(0)))()


def draw(
    name: str, release: "Release | None", small: bool, ours: bool = True
) -> dict[str, dict[str, Any]]:
    """Sampling with guidance: how long one image takes, and how many a second 64 at once are."""
    from var_jax.training.aot import model_flops

    config, rows = config_of(name, small), {}
    weights = sampling_weights(config) if ours else None
    for images in (1, 4) if small else (1, 64):
        rows[f"{name}, sample {images} with guidance"] = compare(
            images,
            ({"ours": sampling(config, weights, images)} if ours else {})
            | theirs_of(release, "sampling", config, images),
            model_flops(config, "sampler"),
            latency=images == 1,
        )
        tidy(release)
    return rows


def sampling_weights(config: Any) -> Any:
    """Both models with random weights."""
    import jax
    from flax import nnx

    from var_jax.models.var import Transformer
    from var_jax.sampling.autoregressive import Weights

    transformer = jax.jit(lambda: Transformer(config.transformer, rngs=nnx.Rngs(1)))()
    return Weights(tokenizer_of(config), transformer)


def sampling(config: Any, weights: Any, images: int) -> Program:
    """Draws images of the first classes."""
    import jax.numpy as jnp

    from var_jax.sampling.autoregressive import sample
    from var_jax.sampling.generate import image_keys

    index = jnp.arange(images)
    return call(sample, weights, index % config.transformer.num_classes, image_keys(0, index))


def codec(_: str, release: "Release | None", small: bool) -> dict[str, dict[str, Any]]:
    """Images to tokens and back, in float32.

    On a GPU `Precision.HIGH`, which our tokenizer asks for, is TF32 (jax.lax.Precision), and so
    PyTorch's is; only our quantizer keeps all bits.
    """
    import jax
    import jax.numpy as jnp

    from var_jax.models.tokenizer import Tokenizer
    from var_jax.schedule import shape_of

    config, images = config_of("d16", small), 2 if small else 32
    tokenizer, sides = tokenizer_of(config), shape_of(config.data.size)
    image = jax.random.uniform(jax.random.key(0), (images, *sides, 3), minval=-1)
    tokens = jnp.zeros((images, config.transformer.num_tokens), jnp.int32)
    ours = {
        "encode": call(jax.jit(type(tokenizer).encode), tokenizer, image),
        "decode": call(jax.jit(Tokenizer.decode), tokenizer, tokens),
    }
    theirs = theirs_of(release, "codec", config, images)
    return {
        f"{task}, {images} images, float32 as TF32": compare(
            images, {"ours": program, **theirs.get(task, {})}
        )
        for task, program in ours.items()
    }


def presets(_: str, release: "Release | None", small: bool) -> dict[str, dict[str, Any]]:
    """The steps of the small experiments, the release's transformer at the same sizes.

    What reads pixels has a codec of patches, which the release has no like of: a dash.
    """
    rows = {}
    for name in ("emoji", "fashion"):
        config = config_of(name, small)
        for program, training, title in (
            ("tokenizer", config.train_tokenizer, "tokenizer"),
            ("pixels", config.train_transformer, "transformer on pixels"),
            ("transformer", config.train_transformer, "transformer on tokens"),
        ):
            images, row = training.batch_size, f"{name}, train {title}"
            theirs = {}
            if program == "transformer":
                theirs = theirs_of(release, "training", config, images, False)
            rows[row] = compare(images, {"ours": training_step(config, images, program)} | theirs)
            if program != "transformer":
                rows[row] |= {"eager": "—", "compiled": "—"}
            del theirs
            tidy(release)
    return rows


# The release


class Release:
    """The PyTorch release's programs, each as published ("eager") and compiled."""

    def __init__(self, path: str):
        import torch  # type: ignore[import-not-found]

        sys.path.insert(0, path)
        import models  # type: ignore[import-not-found]  # noqa: F401

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # As its demo and its training do, and as fast as ours: see `codec`.
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.set_float32_matmul_precision("high")

    def build(self, config: Any) -> tuple[Any, Any]:
        """Tokenizer and transformer of a config's sizes, with random weights.

        `build_vae_var` has no widths but 64 times the depth. The codec is always the release's,
        whatever the config's is.
        """
        from models import VAR, VQVAE  # type: ignore[import-not-found]

        c = config.transformer
        with self.torch.device(self.device):  # where drawing weights takes no time
            vae = VQVAE(
                vocab_size=c.vocab_size, z_channels=c.latent_dim, ch=config.tokenizer.channels,
                v_patch_nums=c.patch_nums,
            )  # fmt: skip
            var = VAR(
                vae, num_classes=c.num_classes, depth=c.depth, embed_dim=c.width,
                num_heads=c.num_heads, drop_path_rate=c.drop_path, shared_aln=c.shared_adaln,
                attn_l2_norm=c.qk_norm, patch_nums=c.patch_nums,
            )  # fmt: skip
        var.init_weights(init_adaln=0.5, init_adaln_gamma=1e-5, init_head=0.02, init_std=-1)
        return vae.eval(), var

    def tidy(self) -> None:
        """Gives back the memory of programs that nothing refers to any more."""
        with contextlib.suppress(ImportError):  # where nothing was compiled either
            self.torch.compiler.reset()  # compiled code holds its model
        gc.collect()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()

    def program(self, run: Run) -> Program:
        """`run`, and then until the device has done it."""
        cuda = self.torch.cuda

        def both() -> None:
            run()
            if self.device == "cuda":
                cuda.synchronize()

        def memory() -> float | None:
            if self.device != "cuda":
                return None
            cuda.reset_peak_memory_stats()
            both()
            return cuda.max_memory_allocated() / 1e9

        return Program(both, memory)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` under torch.compile from its first call on, which is what may fail."""
        made = functools.cache(lambda: self.torch.compile(function))
        return lambda *args: made()(*args)

    def training(self, config: Any, images: int, pixels: bool) -> dict[str, Program]:
        """A step of trainer.py: encode, forward and backward under autocast, clip, AdamW."""
        torch = self.torch
        vae, var = self.build(config)
        side = vae.downsample * vae.quantize.v_patch_nums[-1]
        image = 2 * torch.rand(images, 3, side, side, device=self.device) - 1
        label = torch.randint(0, var.num_classes, (images,), device=self.device)
        cached = [
            torch.randint(0, var.V, (images, side**2), device=self.device)
            for side in var.patch_nums
        ]
        optimizer = torch.optim.AdamW(
            var.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=self.device == "cuda"
        )

        @torch.no_grad()
        def encoded():
            idx = vae.img_to_idxBl(image) if pixels else cached
            return torch.cat(idx, 1), vae.quantize.idxBl_to_var_input(idx)

        def step(forward: Callable[..., Any]) -> None:
            var.train()
            target, inputs = encoded()
            with torch.autocast(self.device, torch.bfloat16):
                logits = forward(label, inputs)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(var.parameters(), 2.0)
            optimizer.step()

        compiled = self.compiled(var)
        return {
            "eager": self.program(lambda: step(var)),
            "compiled": self.program(lambda: step(compiled)),
        }

    def sampling(self, config: Any, images: int) -> dict[str, Program]:
        """`autoregressive_infer_cfg` under autocast, as the release's notebook runs it."""
        torch = self.torch
        _, var = self.build(config)
        label = torch.randint(0, var.num_classes, (images,), device=self.device)

        def run() -> None:
            var.eval()
            with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16):
                var.autoregressive_infer_cfg(images, label, 0, 1.5, 900, 0.96)

        return {"eager": self.program(run)}

    def codec(self, config: Any, images: int) -> dict[str, dict[str, Program]]:
        """Encoding and decoding in float32."""
        torch = self.torch
        vae, _ = self.build(config)
        side = vae.downsample * vae.quantize.v_patch_nums[-1]
        image = 2 * torch.rand(images, 3, side, side, device=self.device) - 1
        inside = torch.no_grad()
        encode = inside(lambda: vae.img_to_idxBl(image))
        idx = encode()
        runs = {"encode": encode, "decode": inside(lambda: vae.idxBl_to_img(idx, True, True))}
        return {
            task: {"eager": self.program(run), "compiled": self.program(self.compiled(run))}
            for task, run in runs.items()
        }


if __name__ == "__main__":
    main()
