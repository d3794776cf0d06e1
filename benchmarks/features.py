"""Images a second of FID's Inception features, beside torch-fidelity.

    python benchmarks/features.py [--batch 8] [--size 256] [--rounds 7]
    python benchmarks/features.py --neighbours
    python benchmarks/features.py --dinov2

Both run in this process on the same threads in float32, in turn, with the same random weights;
torch-fidelity is left out where it is not installed. Compiling is apart. The second command tells
time and memory of precision and recall of 50,000 samples and 10,000 reference images, the third how
far DINOv2 is from that of timm, with the same random weights.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Idle torch threads must not spin beside ours.
os.environ |= {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "passive"}

import jax
import numpy as np
from speed import interleaved

from var_jax.checkpoints.torch.pth import write_pth
from var_jax.evaluation.scores import precision_recall
from var_jax.models.features.dino import MEAN, STD, dinov2, load_dinov2
from var_jax.models.features.inception import inception, load_inception, shapes


def main() -> None:
    """Prints a row for each network, and the median ratio of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="of the images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--neighbours", action="store_true", help="precision and recall instead")
    parser.add_argument("--dinov2", action="store_true", help="beside timm instead")
    args = parser.parse_args()
    if args.neighbours:
        neighbours()
        return
    if args.dinov2:
        agreement()
        return
    shape = (args.batch, args.size, args.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        write_pth(path, random_weights())
        tasks = {"var_jax": ours(path, images)} | theirs(path, images)
    for name, task in tasks.items():
        started = time.perf_counter()
        task()
        print(f"{name}: first call {time.perf_counter() - started:.1f} s")
    times = interleaved(list(tasks.values()), args.rounds)
    for name, taken in zip(tasks, times, strict=True):
        print(f"| {name} | {args.batch / statistics.median(taken):.2f} images/s |")
    if len(times) == 2:
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        print(f"var_jax is {ratio:.2f} times as fast")


def neighbours() -> None:
    """Prints a row for each kind of precision and recall; memory is the most of this process."""
    rng = np.random.default_rng(0)
    sets = [rng.standard_normal((count, 2048), np.float32) for count in (50_000, 10_000)]
    for adm in (False, True):
        started = time.perf_counter()
        precision_recall(*sets, adm=adm)
        taken = time.perf_counter() - started
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        name = "precision and recall" + ", ADM's" * adm
        print(f"| {name} | {taken:.0f} s | {most:.1f} GB |", flush=True)


def agreement() -> None:
    """Prints a row for each size: the largest difference, over the deviation of the features."""
    import timm
    import torch

    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    mean, std = (torch.tensor(c)[:, None, None] for c in (MEAN, STD))
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()) / 255
    for name in ("vit_base_patch14_dinov2", "vit_large_patch14_dinov2"):
        network = timm.create_model(name, num_classes=0, img_size=224).eval()
        with torch.no_grad():
            for part, parameter in network.named_parameters():
                if parameter.ndim == 1 or part in ("pos_embed", "cls_token"):
                    centre = float(part.endswith(("weight", "gamma")))
                    parameter.copy_(centre + 0.1 * torch.randn_like(parameter))
            wanted = network((pixels - mean) / std).numpy()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dinov2.pth"
            write_pth(path, {key: value.numpy() for key, value in network.state_dict().items()})
            found = np.asarray(jax.jit(dinov2)(load_dinov2(path), images))
        print(f"| {name} | {np.abs(found - wanted).max() / wanted.std():.1g} |")


def random_weights() -> dict[str, np.ndarray]:
    """A state dict of Inception whose activations neither grow nor vanish."""
    rng, tensors = np.random.default_rng(0), {}
    for name, (h, w, c, f) in shapes().items():
        kernel = rng.standard_normal((f, c, h, w), np.float32) * (2 / (h * w * c)) ** 0.5
        tensors[f"{name}.conv.weight"] = kernel.astype(np.float32)
        for part, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            tensors[f"{name}.bn.{part}"] = np.full(f, value, np.float32)
    classes = rng.standard_normal((1008, 2048), np.float32) / 45
    return tensors | {"fc.weight": classes, "fc.bias": np.zeros(1008, np.float32)}


def ours(path: Path, images: np.ndarray) -> Callable[[], object]:
    """The features of the images, waited for."""
    weights, run = jax.device_put(load_inception(path)), jax.jit(inception)
    return lambda: jax.block_until_ready(run(weights, images))


def theirs(path: Path, images: np.ndarray) -> dict[str, Callable[[], object]]:
    """The same of torch-fidelity, if it is installed."""
    try:
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    return {"torch-fidelity": lambda: network(pixels)}


if __name__ == "__main__":
    main()
