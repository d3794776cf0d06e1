"""Commands end in one sentence and the right exit code, and leave no flags behind."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.monitoring
import pytest
from absl import flags

from var_jax.tools import cli

ROOT = Path(__file__).parents[2]
COMMANDS = ("aot", "convert", "demo", "edit", "encode", "prepare", "sample", "scaling", "train")

SCRIPT = '''
"""A command for the tests."""
import os
from pathlib import Path

from absl import flags

from var_jax import BadInput, Failure
from var_jax.tools import cli, ending
from var_jax.tools.configs import load_config


def define_flags():
    flags.DEFINE_integer("number", None, "how many", required=True)
    flags.DEFINE_float("share", 0.5, "of what")
    flags.DEFINE_bool("only", False, "that")
    flags.DEFINE_string("fail", "", "how to fail")
    cli.define_config_flag()


def main(args):
    if args.fail == "bad":
        raise BadInput("--number is 3; expected 4")
    if args.fail == "full":
        try:
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write '/runs/a/7.orbax-checkpoint-tmp/d': No space left on device")
        except ValueError as error:
            raise RuntimeError("background save failed") from error
    if args.fail in ("memory", "quota"):
        text = {"memory": "Out of memory allocating 2000000000 bytes", "quota": "Quota exceeded"}
        raise RuntimeError(f"RESOURCE_EXHAUSTED: {text[args.fail]}")
    if args.fail == "failure":
        raise Failure("the other host is gone.")
    if args.fail.startswith("/"):
        raise PermissionError(13, "Permission denied", args.fail)
    if args.fail == "late":  # the work has begun
        ending.process.log = Path("error.log")
        raise PermissionError(13, "Permission denied", os.path.abspath("conf.py"))
    if args.fail == "busy":
        raise OSError(5, "Input/output error", "conf.py")
    if args.fail == "interrupt":
        raise KeyboardInterrupt
    if args.fail == "bug":
        raise ValueError("a bug")
    config = load_config(args.config, args.config_field)
    print("ran", args.number, *config.model.values())


if __name__ == "__main__":
    cli.run(main, define_flags)
'''  # noqa: E501

CONFIG = """
from ml_collections import ConfigDict

from var_jax import BadInput


def get_config(size="d16"):
    if size == "word":
        config = ConfigDict({"depth": 16})
        config.depth = "a. b"
    if size == "section":
        config = ConfigDict({"model": {"depth": 16}})
        config.model = "a"
    if size == "bug":
        raise TypeError("a bug in the config")
    if size != "d16":
        raise BadInput(f"size {size!r} is unknown; expected d16")
    model = {"depth": 16, "rate": 0.5, "name": "a", "sides": (1, 2), "flip": False}
    return ConfigDict({"model": model})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "command.py").write_text(SCRIPT)
    (folder / "conf.py").write_text(CONFIG)
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """command(*flags): exit code, stdout and stderr of the command, run in this process."""
    monkeypatch.chdir(folder)
    spec = importlib.util.spec_from_file_location("a_command", folder / "command.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_command", module)
    spec.loader.exec_module(module)
    return lambda *argv: (cli.call(module.main, module.define_flags, argv), *capsys.readouterr())


def wait_until(done, seconds=20):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def process(*argv, cwd, **variables):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


CONF = ["--number=1", "--config=conf.py"]
OTHER_TYPE = "conf.py, line {}: a value of another type in '{}'."


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([], "flag --number is missing; expected a value"),
        (["--number=x"], "flag --number=x: expected a whole number, not 'x'"),
        ([*CONF, "--fial=bad"], "unknown flag --fial; did you mean 'fail'?"),
        ([*CONF, "--noonly=3"], "--noonly=3 does not take an argument"),
        ([*CONF, "--share=nan"], "--share=nan; expected a finite number."),
        ([*CONF, "bad"], "unexpected argument 'bad'; every option is a --flag."),
        (["--number=1"], "flag --config is missing; expected a value"),
        (["--number=1", "--config=no"], "--config=no: no such config; .*imagenet, .* a .py file."),
        (["--number=1", "--config=no.py"], "--config=no.py: no such file; .*"),
        (["--number=1", "--config=~/no.py"], f"--config={Path.home()}/no.py: no such file; .*"),
        (["--number=1", "--config=command.py"], "--config: command.py defines no .* get_config."),
        (["--number=1", "--config=conf.py:d7"], "size 'd7' is unknown; expected d16"),
        (["--number=1", "--config=emoji:no"], ".* has the variants 64 and large, not 'no'."),
        ([*CONF, "--config.model.dpth=3"], "--config has no field 'dpth'; did you mean 'depth'?"),
        ([*CONF, "--config.depth.a.b=3"], "--config has no field 'depth'."),
        (
            [*CONF, "--config.model.depth=x"],
            "--config.model.depth=x; expected a whole number, like 16.",
        ),
        ([*CONF, "--config.model.depth=1.5"], ".*depth=1.5; expected a whole number, like 16."),
        ([*CONF, "--config.model.rate", "nan"], ".*rate=nan; expected a finite number, like 0.5."),
        ([*CONF, "--config.model.flip=3"], ".*flip=3; expected true or false, like False."),
        (
            [*CONF, "--config.model=a"],
            "--config.model=a; expected one of its fields, as in --config.model.depth.",
        ),
        (["--number=1", "--config=conf.py:word"], OTHER_TYPE.format(10, 'config.depth = "a. b"')),
        (["--number=1", "--config=conf.py:section"], OTHER_TYPE.format(13, 'config.model = "a"')),
        (["--number=1", "--config=conf.py:bug"], "conf.py, line 15: TypeError: a bug in the .*"),
        ([*CONF, "--fail=bad"], "--number is 3; expected 4"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(command, argv, sentence):
    code, out, err = command(*argv)
    assert (code, out) == (2, "")
    pattern = sentence if ".*" in sentence else re.escape(sentence)
    assert re.fullmatch(f"error: {pattern}\n", err), err


@pytest.mark.parametrize(
    "fail, sentence",
    [
        ("full", "the disk holding /runs/a is full; free some .* again"),
        ("memory", r"memory is full \(it takes 2.0 GB more\); a smaller batch size needs less"),
        ("quota", "a quota of the cloud is used up; run the same command again later"),
        ("failure", "the other host is gone"),
        ("late", ".*/conf.py: permission denied"),
        ("busy", "conf.py: input/output error"),
    ],
)
def test_a_failure_is_no_bad_input_and_keeps_its_traceback(command, folder, fail, sentence):
    code, _, err = command(*CONF, f"--fail={fail}")
    found = re.fullmatch(f"error: {sentence}; the traceback is in (.*)\n", err)
    assert code == 1 and found, err
    text = Path(found[1]).read_text()
    assert text.startswith("Traceback") and "in main" in text
    assert (Path(found[1]).resolve() == folder / "error.log") == (fail == "late")
    Path(found[1]).unlink()


@pytest.mark.parametrize("named, code", [("/no/flag/names/this", 1), ("conf.py", 2)])
def test_a_path_is_bad_input_where_a_flag_names_it(folder, named, code):
    error = PermissionError(13, "Permission denied", str(folder / named))
    argv = [f"--config={folder}/conf.py", "--number", "1"]
    assert cli.explain(error, argv) == (code, f"{folder / named}: permission denied")


def test_a_folder_that_is_gone(monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: os.stat("/no/such/folder"))
    sentence = "the folder that this command was started in is gone"
    assert cli.explain(FileNotFoundError(2, "No such file", "samples")) == (2, sentence)


ANOTHER = "not used, as results would be others: {}\n"


@pytest.mark.parametrize(
    "variables, said",
    [
        ({}, ""),
        ({"JAX_ENABLE_X64": "1"}, ANOTHER.format("JAX_ENABLE_X64")),
        ({"JAX_DEFAULT_PRNG_IMPL": "rbg"}, ANOTHER.format("JAX_DEFAULT_PRNG_IMPL")),
        (
            {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_RANDOM_SEED_OFFSET": "7"},
            ANOTHER.format("JAX_RANDOM_SEED_OFFSET, JAX_THREEFRY_PARTITIONABLE"),
        ),
        (
            {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
            ANOTHER.format("JAX_DEFAULT_MATMUL_PRECISION, JAX_NUMPY_DTYPE_PROMOTION"),
        ),
        (
            {"JAX_TRANSFER_GUARD": "disallow", "JAX_NO_EXECUTION": "1", "NNX_GRAPH_MODE": "false"},
            ANOTHER.format("JAX_NO_EXECUTION, JAX_TRANSFER_GUARD, NNX_GRAPH_MODE"),
        ),
    ],
)
def test_the_environment_changes_no_number(variables, said):
    code = """if True:
        import flax, jax
        from var_jax.tools import cli
        def main(args):
            x = jax.random.normal(jax.random.key(3), (5,))
            print(x.dtype, x.sum(), flax.config.nnx_graph_mode)
        cli.run(main, lambda: None)"""
    done = process("-c", code, cwd=ROOT, **variables)
    assert (done.stdout, done.stderr) == ("float32 1.8586645 True\n", said)


@pytest.mark.parametrize(
    ("program", "name", "value"),
    [
        (["-m", "var_jax.sample"], "JAX_ENABLE_X64", "maybe"),
        (["-m", "var_jax.train"], "JAX_NUM_CPU_DEVICES", "x"),
        (["-m", "var_jax.aot"], "JAX_DEFAULT_PRNG_IMPL", "foo"),
        (["-m", "var_jax", "encode"], "JAX_DEFAULT_DEVICE", "foo"),
        (["-c", "from var_jax.__main__ import main; main()", "edit"], "JAX_LOG_COMPILES", "3"),
    ],
)
def test_a_value_that_jax_refuses_while_it_is_imported(program, name, value):
    done = process(*program, cwd=ROOT, **{name: value})
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(
        f"error: {name}={value}: jax refuses this value \\(.*\\); correct it or unset it.\n",
        done.stderr,
    )


def test_another_error_of_an_import_keeps_its_traceback(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ValueError('JAX_ENABLE_X64')")
    done = process("-m", "var_jax.sample", cwd=tmp_path, JAX_ENABLE_X64="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "numpy.py" in done.stderr


@pytest.mark.parametrize(
    "flag", ["xla_cpu_enable_fast_math", "xla_allow_excess_precision", "xla_disable_all_hlo_passes"]
)
def test_flags_of_xla_that_change_arithmetic_are_refused(flag):
    code = "from var_jax.tools import cli; cli.run(print, lambda: None)"
    done = process("-c", code, cwd=ROOT, XLA_FLAGS=f"--xla_dump_to=/a --{flag}=true")
    assert (done.returncode, done.stderr) == (
        2, f"error: XLA_FLAGS holds --{flag}, which changes all numbers; unset it.\n",
    )  # fmt: skip


@pytest.mark.parametrize("platform, code", [("cuda", 2), ("abacus", 2)])
def test_a_device_that_cannot_start_is_named(platform, code):
    command = "import jax; from var_jax.tools import cli; cli.run(lambda _: jax.devices(), str)"
    done = process("-c", command, cwd=ROOT, JAX_PLATFORMS=platform)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert f"error: JAX_PLATFORMS={platform}: no such device could be started (" in done.stderr


@pytest.mark.parametrize(
    "setting",
    [
        {"JAX_NUM_CPU_DEVICES": "0"},
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=0"},
    ],
)
def test_no_device_at_all_is_refused(setting):
    command = "import jax; from var_jax.tools import cli; cli.run(lambda _: jax.devices(), str)"
    done = process("-c", command, cwd=ROOT, **setting)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "asks for 0 devices" in done.stderr


def test_a_driver_that_fails_is_no_bad_input(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda': INTERNAL: CUDA_ERROR_UNKNOWN")

    def devices():
        exec(compile("fail()", "jax/_src/xla_bridge.py", "exec"), {"fail": fail})

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(RuntimeError) as raised:
        devices()
    for why, code in ((raised.value.args[0], 1), ("Unknown backend cuda.", 2)):
        raised.value.args = (why,)
        found, sentence = cli.explain(raised.value)
        assert found == code and sentence.startswith("JAX_PLATFORMS=cuda: no such device"), sentence


def test_fields_of_a_config_keep_their_types(command):
    fields = ("depth=20", "rate=1", "name=3", "sides=1,2,3", "flip=true")
    ran = command(*CONF, *(f"--config.model.{field}" for field in fields))
    assert ran == (0, "ran 1 20 True 3 1.0 (1, 2, 3)\n", "")
    ran = command(*CONF, "--config.model.flip", "--config.model.sides", "4", "--config_field=model.depth=2")  # fmt: skip  # noqa: E501
    assert ran == (0, "ran 1 2 True a 0.5 (4,)\n", "")


def test_flags_exist_only_while_their_command_runs(command):
    before = set(flags.FLAGS)
    for argv in (CONF, ["--number=x"], ["--help"]):
        command(*argv)
        assert set(flags.FLAGS) == before


def test_a_process_ends_with_the_exit_code(folder):
    done = process("command.py", *CONF, cwd=folder)
    assert (done.returncode, done.stdout) == (0, "ran 1 16 False a 0.5 (1, 2)\n"), done.stderr
    done = process("command.py", *CONF, "--fail=bad", cwd=folder)
    assert (done.returncode, done.stderr) == (2, "error: --number is 3; expected 4\n")


@pytest.mark.parametrize(
    "variables, cache",
    [
        ({}, "~/.cache/var_jax"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/var_jax"),
        ({"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, ""),
        ({"JAX_COMPILATION_CACHE_DIR": "/dev/null/x"}, None),
        ({"HOME": "/dev/null"}, None),
    ],
)
def test_compiled_programs_are_kept_on_disk(monkeypatch, variables, cache):
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    code = """if True:
        import jax
        from var_jax.tools import cli
        cli.run(lambda args: print(jax.config.jax_compilation_cache_dir), lambda: None)"""
    done = process("-c", code, cwd=ROOT, **variables)
    assert done.stdout.strip() == str(cache and Path(cache).expanduser()), done.stderr


def test_what_compiles_for_long_is_told(monkeypatch, capsys):
    monkeypatch.setattr(cli, "SILENT", 0.05)
    begin, end = cli._tell_compilations("")
    try:
        begin(cli.COMPILES, 0.0, fun_name="jit(step)")
        wait_until(lambda: capsys.readouterr().err == "compiling step\n")
        end(cli.COMPILES, 0.1, fun_name="jit_step")
        begin(cli.COMPILES, 0.0, fun_name="jit_add")  # as one that is short or in the cache
        end(cli.COMPILES, 0.1, fun_name="jit_add")
        time.sleep(0.1)
        assert capsys.readouterr().err == ""
    finally:
        jax.monitoring.unregister_scalar_listener(begin)
        jax.monitoring.unregister_event_duration_listener(end)


def test_help(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "A command for the tests." in out and "how many" in out and "--config" in out


def test_an_interrupt(command):
    assert command(*CONF, "--fail=interrupt") == (130, "", "interrupted\n")


def test_an_interrupted_process_waits_for_no_thread():
    """XLA's may be compiling, which takes a minute and more."""
    code = """if True:
        import threading, time
        from var_jax.tools import cli
        def main(args):
            threading.Thread(target=time.sleep, args=(90,)).start()
            raise KeyboardInterrupt
        cli.run(main, lambda: None)"""
    done = process("-c", code, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_bug_keeps_its_traceback(command):
    with pytest.raises(ValueError, match="a bug"):
        command(*CONF, "--fail=bug")


def test_a_library_without_flags_or_what_only_some_runs_need(tmp_path):
    heavy = ("sklearn", "matplotlib", "tensorboardX", "tensorflow_datasets", "torch")
    alone = "import sys, var_jax; print(*sys.modules)"
    assert "jax" not in process("-c", alone, cwd=tmp_path).stdout.split()
    all_ = ", ".join(f"var_jax.{name}" for name in COMMANDS)
    code = f"import sys, {all_}; from absl import flags; print(*sys.modules, *flags.FLAGS)"
    done = process("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not {*heavy, "checkpoint", "distributed", "out"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "name",
    [
        "sample",
        *(pytest.param(n, marks=pytest.mark.slow) for n in COMMANDS if n != "sample"),
    ],
)
def test_help_of_every_command_by_its_path_too(name, tmp_path):
    done = process(ROOT / "var_jax" / f"{name}.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and f"python -m var_jax.{name}" in done.stdout, done.stderr


def test_no_file_shadows_the_standard_library():
    """Run by its path, a command finds its neighbours first."""
    names = {path.stem for path in (ROOT / "var_jax").iterdir()}
    assert {"train", "tools"} <= names and not names & sys.stdlib_module_names
