"""One table of an NVIDIA GPU: correctness, then training, sampling and codec beside PyTorch.

    pip install -e '.[cuda12,hub]' torch
    git clone https://github.com/FoundationVision/VAR
    python benchmarks/gpu.py --reference VAR [--minutes 7] [--out benchmarks/gpu.json]

A part is a process of its own, in which ours and the release's program run in turn: as published
(eager) and under torch.compile, except sampling, whose cache grows in every pass. Rates are medians
over the rounds. Every part is saved as it ends: a second start measures only what is missing, and a
part that would pass --minutes waits for it. Without --reference, or without what the release
imports (torch, huggingface_hub), only our columns are filled; what does not run is a dash. Memory
is ours, of rows that need more than those before. `--small` is for trying the script on a CPU: tiny
models, and no figure that means anything. `--minutes 0` prints the rows that there are.
"""

import argparse
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
from typing import Any

Run = Callable[[], object]
ROOT = pathlib.Path(__file__).resolve().parents[1]
ROUNDS = 5
PARTS = (  # what most people ask first comes first
    "check", "train d16", "sample d16", "train d30", "sample d30", "codec", "presets",
)  # fmt: skip
ESTIMATE = 75  # seconds of a part that has not run yet
BATCH = {"d16": 64, "d30": 16}  # images of a training step
# Of the attention that is checked: 680 tokens, and 85, an odd number that cuDNN has to have padded.
PATTERNS = ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 4, 8))


def main() -> None:
    """Runs the parts that are missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", help="a clone of the PyTorch release")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure(args.part, args.reference, args.small)))
        return
    ends = time.monotonic() + 60 * args.minutes
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in PARTS:
        if part in done and "failed" not in done[part]:
            continue
        left = ends - time.monotonic()
        if left < ESTIMATE and not args.small:
            print(
                f"{part}: not measured, {max(left, 0):.0f} s are left; start again", file=sys.stderr
            )
            continue
        done[part] = start(part, args.reference, args.small, None if args.small else left)
        beside = args.out.with_suffix(".part")
        beside.write_text(json.dumps(done, indent=1) + "\n")
        beside.replace(args.out)
    print(table(done))


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


def table(done: dict[str, dict[str, Any]]) -> str:
    """All rows in Markdown."""
    found = [part for part in done.values() if "device" in part]
    lines = [f"{found[0]['device']}, {found[0]['versions']}\n"] if found else []
    lines += ["| | images/s | MFU | GB | eager | compiled | times eager |", "|---|" + "---|" * 6]
    for part in PARTS:
        for name, row in done.get(part, {}).get("rows", {}).items():
            cells = [row.get(key) for key in ("ours", "mfu", "memory", "eager", "compiled")]
            both = row.get("ours"), row.get("eager")
            measured = all(isinstance(rate, float) for rate in both)
            cells.append(both[0] / both[1] if measured else None)
            lines.append(f"| {name} | " + " | ".join(map(shown, cells)) + " |")
        if part not in done or "failed" in done[part]:
            reason = f" ({done[part]['failed']})" if part in done else ""
            lines.append(f"| {part} | not measured{reason} |" + " |" * 5)
        for name, text in done.get(part, {}).get("checks", {}).items():
            lines.append(f"| {name} | {text} |" + " |" * 5)
    return "\n".join(lines)


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
            import torch

            versions += f", torch {torch.__version__}"
            release = Release(reference, small)
        except ImportError as error:
            print(f"only ours is measured: {error}", file=sys.stderr)
    about = {"device": device.device_kind, "versions": versions}
    kind, _, name = part.partition(" ")
    if kind == "check":
        return about | {"checks": check()}
    rows = {"train": train, "sample": draw, "codec": codec, "presets": presets}[kind]
    return about | {"rows": rows(name, release, small)}


def compare(images: int, ours: Run, theirs: dict[str, Run], flops: float = 0.0) -> dict[str, Any]:
    """One row: images a second of each program, in turn; `flops` are of one image."""
    import jax

    from var_jax.tools.flops import peak_flops

    row: dict[str, Any] = {}
    peak_bytes = lambda: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    before, ready = peak_bytes(), {}
    for name, run in {"ours": ours, **theirs}.items():
        try:
            run()
            ready[name] = run
        except Exception as error:  # out of memory, or what torch.compile cannot take
            row[name] = "—"
            tell(name, error)
        if name in ready and name == "ours" and (most := peak_bytes()) > before:
            row["memory"] = most / 1e9  # the process's, never reset
    times: dict[str, list[float]] = {name: [] for name in ready}
    try:
        for _ in range(ROUNDS):
            for name, run in ready.items():
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
    except Exception as error:
        tell("a later round", error)
    row |= {name: images / statistics.median(taken) for name, taken in times.items() if taken}
    peak = peak_flops(jax.devices()[0].device_kind)
    if flops and peak and times.get("ours"):
        row["mfu"] = row["ours"] * flops / peak
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
    from golden_cases import CASES, models

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
        out = attention(
            *qkv, pattern, scale=scale, qk_norm=True, implementation=implementation
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


def train(name: str, release: "Release | None", small: bool) -> dict[str, Any]:
    """A training step of d16 or d30 in bfloat16, on tokens and on pixels."""
    import jax

    from var_jax.training.aot import model_flops

    config, images, rows = config_of(name, small), 2 if small else BATCH[name], {}
    for program in ("transformer", "pixels"):
        pixels = program == "pixels"
        theirs = theirs_of(release, "training", name, images, pixels)
        step, flops = training_step(config, images, program), model_flops(config, program)
        row = f"{name}, train on {'pixels' if pixels else 'tokens'}, {images} images"
        rows[row] = compare(images, step, theirs, flops)
        del step, theirs
        gc.collect()
        jax.clear_caches()
    return rows


def training_step(config: Any, images: int, program: str) -> Run:
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
    step = jax.jit(task.step, donate_argnums=0)
    held: list[Any] = []

    def run() -> None:
        if not held:
            held.extend((jax.jit(task.init)(jax.random.key(0)), jnp.zeros((), jnp.int32)))
        held[0], held[1], metrics = step(*held, batch, frozen, jax.random.key(1))
        jax.block_until_ready(metrics)

    return run


def tokenizer_of(config: Any) -> Any:
    """The config's tokenizer with random weights."""
    import jax
    from flax import nnx

    from var_jax.models.patch_codec import make_tokenizer

    return jax.jit(lambda: make_tokenizer(config.tokenizer, rngs=nnx.Rngs(0)))()


def draw(name: str, release: "Release | None", small: bool) -> dict[str, Any]:
    """Sampling with guidance: images a second of one (its latency is the inverse), and of 64."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from var_jax.models.var import Transformer
    from var_jax.sampling.autoregressive import Weights, sample
    from var_jax.sampling.generate import image_keys
    from var_jax.training.aot import model_flops

    config, rows = config_of(name, small), {}
    transformer = jax.jit(lambda: Transformer(config.transformer, rngs=nnx.Rngs(1)))()
    weights = Weights(tokenizer_of(config), transformer)
    for images in (1, 4) if small else (1, 64):
        index = jnp.arange(images)
        labels, keys = index % config.transformer.num_classes, image_keys(0, index)
        ours = lambda labels=labels, keys=keys: jax.block_until_ready(sample(weights, labels, keys))
        theirs = theirs_of(release, "sampling", name, images)
        row = f"{name}, sample {images} with guidance"
        rows[row] = compare(images, ours, theirs, model_flops(config, "sampler"))
    return rows


def codec(_: str, release: "Release | None", small: bool) -> dict[str, Any]:
    """Images to tokens and back, in float32."""
    import jax
    import jax.numpy as jnp

    from var_jax.models.tokenizer import Tokenizer

    config, images = config_of("d16", small), 2 if small else 32
    tokenizer, side = tokenizer_of(config), config.data.size
    image = jax.random.uniform(jax.random.key(0), (images, side, side, 3), minval=-1)
    encode, decode = jax.jit(type(tokenizer).encode), jax.jit(Tokenizer.decode)
    tokens = jnp.zeros((images, config.transformer.num_tokens), jnp.int32)
    ours = {
        "encode": lambda: jax.block_until_ready(encode(tokenizer, image)),
        "decode": lambda: jax.block_until_ready(decode(tokenizer, tokens)),
    }
    theirs = theirs_of(release, "codec", images)
    return {
        f"{task}, {images} images": compare(images, run, theirs.get(task, {}))
        for task, run in ours.items()
    }


def presets(_: str, release: "Release | None", small: bool) -> dict[str, Any]:
    """The steps of the small experiments, which the release has no like of."""
    rows = {}
    for name in ("emoji", "fashion"):
        config = config_of(name, small)
        for program, training in (
            ("tokenizer", config.train_tokenizer), ("pixels", config.train_transformer)
        ):  # fmt: skip
            step = training_step(config, training.batch_size, program)
            row = f"{name}, train {'tokenizer' if program == 'tokenizer' else 'transformer'}"
            rows[row] = compare(training.batch_size, step, {})
    return rows


# The release


class Release:
    """The PyTorch release's programs, each as published ("eager") and compiled."""

    def __init__(self, path: str, small: bool):
        import torch

        sys.path.insert(0, path)
        import models  # type: ignore[import-not-found]  # noqa: F401

        self.torch, self.small = torch, small
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.models: dict[str, tuple[Any, Any]] = {}

    def build(self, name: str) -> tuple[Any, Any]:
        """Tokenizer and transformer with random weights; on a CPU a small pair."""
        from models import build_vae_var  # type: ignore[import-not-found]

        if name not in self.models:
            small = {"patch_nums": (1, 2, 3, 4), "ch": 32, "V": 512} if self.small else {}
            vae, var = build_vae_var(
                self.device, **small, num_classes=10 if self.small else 1000,
                depth=2 if self.small else int(name[1:]),
            )  # fmt: skip
            for parameter in vae.parameters():  # the release leaves them as memory was
                self.torch.nn.init.normal_(parameter, std=0.02)
            self.models = {name: (vae.eval(), var)}
        return self.models[name]

    def waits(self, run: Run) -> Run:
        """`run`, and then until the device has done it."""

        def both() -> None:
            run()
            if self.device == "cuda":
                self.torch.cuda.synchronize()

        return both

    def training(self, name: str, images: int, pixels: bool) -> dict[str, Run]:
        """A step of trainer.py: encode, forward and backward under autocast, clip, AdamW."""
        torch = self.torch
        vae, var = self.build(name)
        side = 16 * vae.quantize.v_patch_nums[-1]
        image = 2 * torch.rand(images, 3, side, side, device=self.device) - 1
        label = torch.randint(0, var.num_classes, (images,), device=self.device)
        optimizer = torch.optim.AdamW(
            var.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=self.device == "cuda"
        )

        @torch.no_grad()
        def encoded():
            idx = vae.img_to_idxBl(image)
            return torch.cat(idx, 1), vae.quantize.idxBl_to_var_input(idx)

        cached = encoded()

        def step(forward: Callable[..., Any]) -> None:
            var.train()
            target, inputs = encoded() if pixels else cached
            with torch.autocast(self.device, torch.bfloat16):
                logits = forward(label, inputs)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(var.parameters(), 2.0)
            optimizer.step()

        compiled = torch.compile(var)
        return {
            "eager": self.waits(lambda: step(var)),
            "compiled": self.waits(lambda: step(compiled)),
        }

    def sampling(self, name: str, images: int) -> dict[str, Run]:
        """`autoregressive_infer_cfg` under autocast, as the release's notebook runs it."""
        torch = self.torch
        _, var = self.build(name)
        label = torch.randint(0, var.num_classes, (images,), device=self.device)

        def run() -> None:
            var.eval()
            with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16):
                var.autoregressive_infer_cfg(images, label, 0, 1.5, 900, 0.96)

        return {"eager": self.waits(run)}

    def codec(self, images: int) -> dict[str, dict[str, Run]]:
        """Encoding and decoding in float32."""
        torch = self.torch
        vae, _ = self.build("d16")
        side = 16 * vae.quantize.v_patch_nums[-1]
        image = 2 * torch.rand(images, 3, side, side, device=self.device) - 1
        inside = torch.no_grad()
        encode = inside(lambda: vae.img_to_idxBl(image))
        idx = encode()
        runs = {"encode": encode, "decode": inside(lambda: vae.idxBl_to_img(idx, True, True))}
        return {
            task: {"eager": self.waits(run), "compiled": self.waits(torch.compile(run))}
            for task, run in runs.items()
        }


if __name__ == "__main__":
    main()
