"""`hub:d16`: downloaded, checked, converted once; on a server of the hub's protocol on loopback."""

import json
import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from golden_cases import load, models, state_dict
from hub_server import COMMIT, Server

from var_jax import BadInput, Failure
from var_jax.checkpoints import hub
from var_jax.checkpoints.torch.names import buffers
from var_jax.checkpoints.torch.pth import write_pth
from var_jax.sampling.exports import abstract_models, convert, load_models

TOKENIZER, TRANSFORMER = "vae_ch160v4096z32.pth", "var_d16.pth"


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The case "base" under the names of the official files."""
    folder, config = tmp_path_factory.mktemp("official"), json.loads(str(load("base")["config"]))
    for part, name in (("tokenizer", TOKENIZER), ("transformer", TRANSFORMER)):
        tensors = state_dict("base", part, config[f"weights_seed_{part}"])
        write_pth(folder / name, tensors | buffers(models("base")[part == "transformer"]))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    """The hub, and an empty cache."""
    server = Server(files)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(hub, "PAUSE", 0.01)
    hub.cache().mkdir(parents=True)
    yield server
    server.shutdown()
    server.server_close()


def cached():
    """The names in the cache, without their checksums."""
    names = {path.name for path in hub.cache().iterdir()} - {".lock"}
    return sorted(name.split("-")[-1] for name in names)


def test_weights_are_downloaded_and_converted_once(server, capsys):
    found = load_models("hub:d16")
    assert found.class_names == tuple("0123456789")
    for ours, wanted in zip(found[:2], models("base")[:2], strict=True):
        for leaf, golden in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(leaf, golden)
    assert cached() == ["d16", TOKENIZER]  # other models need the tokenizer too
    said = capsys.readouterr().err
    assert f"{TRANSFORMER} (1 MB)" in said and "converting var_d16.pth into" in said
    server.shutdown()  # no network
    server.server_close()
    assert len(server.requests) == 4
    assert abstract_models("hub:d16")[0] == hub.folder("hub:d16")


def test_an_old_huggingface_hub_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "__version__", "0.36.0")
    with pytest.raises(BadInput, match=r"needs huggingface_hub from 1\.0 on"):
        hub.fetch("hub:d16", convert)


def test_more_than_was_stated_is_not_written_to_the_end(tmp_path, monkeypatch):
    class Response:
        status_code = 206
        __enter__, __exit__ = lambda self: self, lambda self, *_: None
        raise_for_status = lambda self: self
        iter_bytes = lambda self: iter([bytes(600)] * 10**6)

    session = SimpleNamespace(stream=lambda *_, **__: Response())
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(huggingface_hub, "hf_raise_for_status", lambda response: None)
    with (tmp_path / "part").open("ab") as file:
        hub.append("http://hub", file, 1000, SimpleNamespace(update=lambda n: None))
        assert file.tell() == 1200


@pytest.mark.parametrize("cuts", [1, 3])
def test_a_broken_connection_is_taken_up_where_it_broke(server, files, cuts):
    server.cuts = cuts
    assert hub.download(TRANSFORMER, "main").read_bytes() == files[TRANSFORMER]
    ranges = [int(r.split("=")[1][:-1]) for r in server.requests if r.startswith("GET")]
    assert len(ranges) == cuts + 1 and ranges == sorted(set(ranges))


def test_a_stopped_download_goes_on_where_it_was(server, files):
    server.cuts = 10**6  # until the last byte, which never comes
    server.files[TRANSFORMER] = files[TRANSFORMER][:5000]
    with pytest.raises(Failure, match=r"pth broke off after 4999 of 5000 bytes \(.*\); the same"):
        hub.download(TRANSFORMER, "main")
    server.cuts, server.requests = 0, []
    assert hub.download(TRANSFORMER, "main").read_bytes() == files[TRANSFORMER][:5000]
    assert server.requests[-1] == f"GET {TRANSFORMER} bytes=4999-"


def test_damaged_bytes_are_told_and_downloaded_again(server, files):
    server.stated[TOKENIZER] = 64 * "0"
    with pytest.raises(Failure, match=f"is damaged: its SHA-256 is .*, the hub states {64 * '0'}"):
        load_models("hub:d16")
    assert cached() == []
    server.stated.clear()
    assert hub.download(TOKENIZER, "main").read_bytes() == files[TOKENIZER]


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(401, "401"), (403, "403"), (404, "404"), (429, "429"), (503, "503")],
)
def test_the_hub_refuses(server, status, sentence):
    server.status = status
    with pytest.raises(Failure, match=f"cannot be downloaded: .*{sentence}") as refused:
        hub.download(TRANSFORMER, "main")
    assert "\n" not in str(refused.value) and cached() == []


def test_a_file_that_is_gone(server):
    del server.files[TRANSFORMER]
    with pytest.raises(Failure, match=r"var_d16.pth cannot be downloaded: "):
        load_models("hub:d16")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("hub:d17", "hub:d17 is not known; expected one of hub:d16, hub:d20, hub:d24, hub:d30, hu"),
        ("hub:", "hub: is not known"),
        ("hub:d16@../..", r"hub:d16@\.\./\.\. is not known"),
        ("hub:d16@", "hub:d16@ is not known"),
        ("hub:d16@old", "FoundationVision/var has no revision 'old'"),
    ],
)
def test_unknown_names(server, name, sentence):
    with pytest.raises(BadInput, match=sentence):
        load_models(name)


@pytest.mark.slow
def test_a_revision_has_a_cache_of_its_own(server):
    assert hub.fetch(f"hub:d16@{COMMIT}", convert) == hub.folder("hub:d16").parent / f"d16@{COMMIT}"


def test_without_a_network(server, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
    with pytest.raises(Failure, match=r"cannot be downloaded: .*onnect"):
        hub.download(TRANSFORMER, "main")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Failure, match=r"cannot be downloaded: .*offline"):
        hub.download(TRANSFORMER, "main")


@pytest.mark.slow
def test_two_at_once_download_once(server):
    folders, made = [], threading.Event()

    def slow(paths, folder):
        made.wait(10)
        convert(paths, folder)

    first, second = (
        threading.Thread(target=lambda: folders.append(hub.fetch("hub:d16", slow))) for _ in "12"
    )
    first.start()
    second.start()
    second.join(0.2)
    assert second.is_alive()
    made.set()
    first.join()
    second.join()
    assert folders == 2 * [hub.folder("hub:d16")]
    assert sorted(r.split()[0] for r in server.requests) == ["GET", "GET", "HEAD", "HEAD"]


@pytest.mark.slow
def test_commands_take_a_name(server, tmp_path):
    """In processes of their own, with the exit codes of each kind of end."""

    def sample(name):
        argv = ["sample", "--checkpoint", name, "--labels", "3", "--out", tmp_path / "samples"]
        command = [sys.executable, "-m", f"var_jax.{argv[0]}", *map(str, argv[1:])]
        return subprocess.run(command, env=os.environ, capture_output=True, text=True)

    assert sample("hub:d17").returncode == 2
    server.status = 503
    failed = sample("hub:d16")
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1
    server.status = 200
    assert sample("hub:d16").returncode == 0
    assert (tmp_path / "samples" / "samples.npz").exists()
