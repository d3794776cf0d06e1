"""The report on a step compiled for TPUs that are not there."""

import json
import runpy
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest
from running import ROOT, complaint, run, run_alone

from var_jax.config import Config, SamplingConfig, TransformerConfig, from_dict
from var_jax.models import backend
from var_jax.sampling import autoregressive
from var_jax.sampling.exports import build
from var_jax.sharding.mesh import sampling_mesh
from var_jax.tools.configs import load_config
from var_jax.tools.flops import transformer_flops
from var_jax.training.aot import batch_of, lower, model_flops

SMALL = (
    "--config", "imagenet:d16", "--config.transformer.depth=2",
    "--config.transformer.width=128", "--config.transformer.num_heads=2", "--topology", "v5e:2x2",
    "--config.train_transformer.batch_size=256", "--json",
)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--topology", "v5e:2x2"], "--config is missing"),
        ([*SMALL[:2]], "--topology is missing"),
        ([*SMALL[:2], "--topology", "v9:2x2"], "'v9:2x2' is not of v5e, v5p, v6e"),
    ],
)
def test_bad_input(flags, sentence):
    assert sentence in complaint("aot", *flags)


def test_a_step_on_pixels_counts_every_operation_of_the_encoder():
    pixels, tokens = (model_flops(Config(), program) for program in ("pixels", "transformer"))
    # Three quarters are (4 + 5/4) * 2 * 9 * 160**2 * 256**2: the 3x3 convolutions of the two finest
    # levels.
    assert (pixels - tokens) / 1e9 == pytest.approx(215.36, rel=1e-4)


@pytest.mark.slow
def test_guidance_doubles_the_operations_of_the_transformer_alone():
    without = Config(sampling=SamplingConfig(cfg=0))
    forward = transformer_flops(Config().transformer, backward=False)
    doubled = model_flops(Config(), "sampler") - model_flops(without, "sampler")
    assert doubled == pytest.approx(forward)


def test_layers_are_unrolled_for_tpus_unless_all_of_them_are_recomputed():
    """And what "selective" recomputes is recomputed, though XLA could find that it has it."""
    found = {}
    for platform, remat in [*(("tpu", r) for r in ("none", "selective", "full")), ("cpu", "full")]:
        config = TransformerConfig(
            depth=2, width=64, num_heads=2, patch_nums=(1, 2), num_classes=2, latent_dim=8,
            attention="masked", remat=remat,
        )  # fmt: skip
        with backend.assume(platform):
            grad = jax.grad(lambda m, x: m(jnp.zeros(3, jnp.int32), x).sum())
            text = jax.jit(grad).lower(build(config), jnp.zeros((3, 4, 8))).as_text()
        found[platform, remat] = "stablehlo.while" in text, text.count("optimization_barrier")
    assert found["tpu", "none"] == (False, 0)
    loops, barriers = found["tpu", "selective"]
    assert not loops and barriers in (6, 12)  # of six parts, which some versions of jax share
    assert found["tpu", "full"] == found["cpu", "full"] == (True, 0)


def test_inception_has_the_operations_that_are_known_of_it():
    """At 299 pixels 5.71 billion multiplications, says torchvision, and those that resize."""
    resizing = 3 * 256 * 299 * (256 + 299)
    assert model_flops(Config(), "features") == pytest.approx(2 * (5.71e9 + resizing), rel=0.01)


def test_the_sampler_is_the_one_that_sample_runs(untrained, tmp_path, monkeypatch):
    """Of a checkpoint that was trained with its weights split over two devices."""
    copy, program = tmp_path / "copy", []
    shutil.copytree(untrained, copy)
    about = json.loads((copy / "config.json").read_text())
    about["trained"]["mesh"]["fsdp"] = 2
    del about["checksums"]
    (copy / "config.json").write_text(json.dumps(about))

    def stop(*args, **kwargs):
        program.append(sample.lower(*args, **kwargs).as_text())
        raise KeyboardInterrupt

    sample = autoregressive.sample
    monkeypatch.setattr(autoregressive, "sample", stop)
    flags = ("--num", 8, "--batch_size", 8, "--out", tmp_path / "out")
    assert run("sample", "--checkpoint", copy, *flags)[0] == 130
    monkeypatch.undo()
    config = from_dict(Config, about["trained"])
    mesh = sampling_mesh(config.mesh.fsdp, config.mesh.tensor)
    assert mesh.shape == {"data": 4, "fsdp": 2, "tensor": 1}
    with jax.set_mesh(mesh):
        assert lower(config, "sampler", mesh, 8)[0].as_text() == program[0]


def test_the_rows_of_the_benchmark_are_configs_and_become_a_table(tmp_path, monkeypatch, capsys):
    script = runpy.run_path(str(ROOT / "benchmarks" / "aot.py"))
    rows = [row for name in ("TRAINING", "OTHERS", "BASELINES") for row in script[name]]
    for row in rows:
        config = from_dict(Config, load_config(script["flags"](row)[1], row.fields))
        found = dict(
            mesh="1x4x1", batch_size=batch_of(config, row.program), fits=row.topology != "v6e:8x8",
            chips=4, bytes_per_chip=8e9, memory_per_chip=17.2e9, estimated_cycles=5e8,
            kernel_cycles_charged=4e7, efficiency=0.5, images_per_second=80.0, step_seconds=0.1,
            collective_bytes=2e9, collective_bytes_fsdp=1e9, compile_seconds=9,
            compile_cpu_seconds=5,
            cycles_by_group={"matrix products": 3e8, "copies and layouts": 1e7},
        )  # fmt: skip
        name = "_".join((row.config, row.topology, row.program, *row.fields)).replace(":", "-")
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert len({*tmp_path.iterdir()}) == len(rows)  # a file each
    monkeypatch.setattr(sys, "argv", ["aot.py", "--out", str(tmp_path)])
    script["main"]()
    said = capsys.readouterr().out
    tables = [table.splitlines() for table in said.strip().split("\n\n")]
    assert [len(table) - 2 for table in tables] == [21, 9, 3]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    step = "8.0 of 17.2|500|40|0.50|80|2.0 (1.0)|9 (5 of CPU)|"
    assert f"|d16|v5e:4x8|1x4x1|768|transformer, nothing recomputed|{step}" in said
    other = "8.0 of 17.2|500 (300, 0, 10; 40)|0.1|20|9 (5 of CPU)|"
    assert f"|d30|v5e:2x2|1x4x1|32|sampler, eight images a chip|{other}" in said
    assert "|d30|v6e:8x8|1x4x1|1024|pixels|8.0 of 17.2: too much|-|-|-|-|-|9 (5 of CPU)|" in said


@pytest.mark.slow
@pytest.mark.tpu
def test_report():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install -e '.[tpu]'")
    code, out, err = run_alone("aot", *SMALL)
    assert code == 0, err
    report = json.loads(out)
    assert report["chips"] == 4 and report["fits"]
    assert 0 < report["efficiency"] < 1
    assert report["kernel_cycles_charged"] > 0
    assert report["bytes_per_chip"] > report["bytes_activations"] > 0
    assert report["collective_bytes_by_kind"]["all-gather"] > 0
    gradients = report["collective_bytes_fsdp"] / 3  # two bytes of each
    assert report["collective_bytes_by_kind"]["reduce-scatter"] > gradients
    total = report["estimated_cycles"] + report["kernel_cycles_charged"]
    assert report["efficiency"] == pytest.approx(report["yardstick_cycles"] / total, rel=1e-3)
    code, out, _ = run_alone(
        "aot", *SMALL[:-2], "--config.train_transformer.batch_size=40000", "--json"
    )
    assert code == 0 and not json.loads(out)["fits"]
