"""The demo: what its controls and links mean, who may visit, and the page in a real browser."""

import asyncio
import io
import json
import re
import shutil
import socket
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from running import complaint, start
from tiny import get_config

import var_jax
from var_jax import BadInput, demo
from var_jax.config import Config, from_dict
from var_jax.sampling import page
from var_jax.sampling.exports import Models, build
from var_jax.sampling.page import Settings
from var_jax.schedule import shape_of

NAMES = (*"abcdefg", "Symbols", "Flags")


@pytest.fixture(scope="module")
def model():
    """A model without weights: most of a page needs its names and sizes only."""
    config = from_dict(Config, get_config().to_dict())
    parts = build(config.tokenizer), build(config.transformer)
    return var_jax.Model(Models(*parts, NAMES, config.sampling))


@pytest.fixture(scope="module")
def loaded(untrained):
    return var_jax.load(untrained)


def test_a_link_restores_its_settings(model):
    query = {"class": "8", "seed": "7", "cfg": "1.5", "top_k": "30,5,0", "top_p": "1,0.5,0.5"}
    wanted = Settings(8, 7, 1.5, "30,5,0", "1,0.5,0.5", 0.3)
    assert Settings.of_link(model, query | {"margin": "0.3"}) == wanted
    sampling = wanted.sampling(model)
    assert (sampling["top_k"], sampling["top_p"]) == ((30, 5, 0), (1, 0.5, 0.5))
    assert Settings.of_link(model, {}) == Settings.default(model)
    assert Settings.default(model).top_k == "0"  # of 64 codes, while the checkpoint says 900
    named = {"class": "Flags", "seed": "7", "utm_source": "mail"}
    assert Settings.of_link(model, named) == Settings.of_link(model, {"class": "8", "seed": "7"})
    assert Settings.of_link(model, {"class": "-1"}).sampling(model)["label"] is None


def test_links_hold_numbers_of_classes_whose_names_are_numbers_too(model):
    numbered = tuple("123456789")
    other = var_jax.Model(model.models._replace(class_names=numbered), model.mesh)
    assert Settings.of_link(other, {"class": "1"}).label == 1  # that is called 2


def test_an_emptied_control_is_named(model):
    with pytest.raises(BadInput, match="seed='None'; expected a number"):
        next(page.Handlers(model).sample(0, None, 0, 0, "1", 0.25))


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"class": "Cars"}, "class holds 'Cars'; the classes of this checkpoint are"),
        ({"class": "9"}, "class holds 9; classes are 0 to 8"),
        ({"seed": "-1"}, "seed=-1; expected 0 to 4294967295"),
        ({"seed": "1.5"}, "seed='1.5'; expected a number"),
        ({"cfg": "much"}, "cfg='much'; expected a number"),
        ({"cfg": "nan"}, "cfg=nan"),
        ({"cfg": "1e9"}, "cfg=1000000000.0; expected 0 to 1000"),
        ({"top_k": "-1"}, "top_k=-1; expected a whole number"),
        ({"top_p": "0.5,x"}, "top_p='x'; expected a number"),
        ({"top_p": "0.5,0.5"}, "top_p=0.5,0.5 has 2 numbers"),
        ({"margin": "0.5"}, "margin=0.5; expected 0.05 to 0.45"),
        ({"cfg": "11"}, "cfg=11.0; expected 0 to 10"),
        ({"top_k": "6,5"}, "top_k=6,5 has 2 numbers"),
    ],
)
def test_a_link_with_something_out_of_range(model, query, sentence):
    with pytest.raises(BadInput) as refused:
        Settings.of_link(model, query)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.png", b"not an image", "a.png cannot be read: no image in a known format"),
        ("a.png", b"", "a.png cannot be read"),
        ("b.jpg", b"\xff\xd8\xff\xe0" + bytes(99), "b.jpg cannot be read"),
        ("c.png", bytes(page.MAX_BYTES + 1), "has 10,485,761 bytes; expected at most 10,485,760"),
    ],
)
def test_bad_uploads(model, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=sentence):
        page.read_upload(str(tmp_path / name), model)


def test_an_upload_of_too_many_pixels(model, tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    pieces = b"\x89PNG\r\n\x1a\n", struct.pack(">I", 13), header, zlib.crc32(header).to_bytes(4)
    (tmp_path / "bomb.png").write_bytes(b"".join(pieces) + bytes(3) + b"\x63IDAT" + bytes(99))
    with pytest.raises(BadInput, match=r"bomb.png cannot be read: .*pixels"):
        page.read_upload(str(tmp_path / "bomb.png"), model)


def test_uploads_are_bounded_each_and_in_total(model, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(page, "MAX_KEPT", 35 * 2**20)
    visitor, address = TestClient(page.web_app(model, "tiny", None)), "/gradio_api/upload"

    def upload(*contents):
        files = [("files", (f"{i}.png", content)) for i, content in enumerate(contents)]
        return visitor.post(address, files=files).status_code

    def kept():
        return sorted(path.read_bytes()[0] for path in tmp_path.rglob("*.png"))

    for number in range(6):
        assert upload(bytes([number]) * page.MAX_BYTES) == 200
    assert kept() == [3, 4, 5] and len([*tmp_path.rglob("*.png")]) == len([*tmp_path.iterdir()])
    assert upload(*[bytes(2**20)] * 12) == 413  # no file is too large
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert visitor.post(address, content=iter([b"--x"]), headers=headers).status_code == 411
    assert kept() == [3, 4, 5]  # what is refused removes nothing
    assert upload(bytes(page.MAX_BYTES + 1)) == 413  # gradio's own check


def test_uploads_at_once_are_bounded_in_total(tmp_path):
    async def slow(scope, receive, send):
        await ends.wait()

    async def visit():
        bounded, answers = page.Bounded(slow, tmp_path), []
        length = [(b"content-length", str(page.MAX_BYTES).encode())]
        scope = {"type": "http", "method": "POST", "headers": length}

        async def send(message):
            answers.append(message.get("status"))

        ask = lambda: asyncio.create_task(bounded(scope, None, send))
        tasks = [ask() for _ in range(page.MAX_KEPT // page.MAX_BYTES + 1)]
        await asyncio.wait(tasks, timeout=0.2)
        assert [status for status in answers if status] == [503]
        ends.set()
        await asyncio.wait(tasks)
        await ask()
        assert bounded.coming == 0 and answers.count(503) == 1

    ends = asyncio.Event()
    asyncio.run(visit())


def test_uploads_are_cropped(model, tmp_path):
    Image.new("RGBA", (90, 50), "red").save(tmp_path / "a.png")
    image = page.read_upload(str(tmp_path / "a.png"), model)
    assert image.shape == (16, 16, 3) and (image == (255, 0, 0)).all()


def test_strokes_and_margins_are_cells(model):
    strokes = np.zeros((512, 512, 4), np.uint8)
    strokes[100:190, 130:250, 3] = 255  # most of cell (0, 1) of 4 x 4, and half of cell (1, 1)
    mask = page.brushed(strokes, model)
    assert mask.shape == (16, 16)
    assert mask[::4, ::4].tolist() == [[False] * 4, [False, True, False, False], *[[False] * 4] * 2]
    inside = page.in_margin(0.25, model)[::4, ::4]
    assert inside.sum() == 12 and not inside[1:3, 1:3].any()
    for empty in (None, np.zeros((512, 512, 4), np.uint8)):
        with pytest.raises(BadInput, match="nothing is brushed yet"):
            page.brushed(empty, model)
    with pytest.raises(BadInput, match="less than half a cell"):
        page.in_margin(0.05, model)


def test_the_strip_has_a_place_for_each_scale(model):
    images = [np.zeros((16, 16, 3), np.uint8)] * 2
    html = page.strip(model, images, images[0])
    assert html.count("<img") == 3 and html.count("<span>") == 1
    assert re.findall(r"\d&times;\d", re.sub('alt="[^"]*"', "", html)) == [
        f"{n}&times;{n}" for n in (1, 2, 4)
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--host", "0.0.0.0"), "--host=0.0.0.0 lets other machines in, which takes a password"),
        (("--host", "::"), "--host=:: lets other machines in"),
        (("--host", "no.such.host.invalid"), "lets other machines in"),
        (("--port", "70000"), "--port"),
        (("--checkpoint", "nowhere", "--port", "0"), "nowhere is not a checkpoint"),
    ],
)
def test_bad_flags(monkeypatch, flags, sentence):
    monkeypatch.delenv("VAR_JAX_PASSWORD", raising=False)
    assert sentence in complaint("demo", "--checkpoint", "emoji", *flags)


@pytest.mark.parametrize("host", [".", "127.0.0..1", "a" * 70 + ".com"])
def test_a_host_that_is_no_name(host):
    with pytest.raises(BadInput, match="cannot be served at"):
        demo.listen(host, 0)


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = complaint("demo", "--checkpoint", "emoji", "--port", port)
    assert f"--host=127.0.0.1 --port={port} cannot be served at: address already in use" in said


def serve(checkpoint, *flags):
    """A demo as a process of its own, and its address."""
    process = start("demo", "--checkpoint", checkpoint, "--port", 0, *flags)
    address = re.search(r"http://\S+:(\d+) is ready", process.stdout.readline())
    assert address, process.stderr.read()
    return process, f"http://127.0.0.1:{address[1]}/"


def stop(process):
    """Ends it as Ctrl-C does."""
    process.send_signal(2)
    try:
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()


@pytest.mark.slow
def test_others_are_asked_for_the_password(untrained, monkeypatch):
    monkeypatch.setenv("VAR_JAX_PASSWORD", "open sesame")
    process, address = serve(untrained, "--host", "0.0.0.0")

    def log_in(password):
        form = urllib.parse.urlencode({"username": "me", "password": password}).encode()
        return urllib.request.urlopen(address + "login", form).status

    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address + "config")
        for wrong in ("", "wrong", "öffne"):
            with pytest.raises(urllib.error.HTTPError, match=r"4\d\d"):
                log_in(wrong)
        assert log_in("open sesame") == 200
    finally:
        stop(process)


@pytest.fixture(scope="module")
def address(untrained):
    process, address = serve(untrained)
    yield address
    stop(process)


@pytest.fixture
def queue(model, tmp_path, monkeypatch):
    """A served page whose images wait for an event: how to press its button in a session of a name,
    how many images are being made, the event, and what the page keeps of its visitors.
    """
    import uvicorn

    goes_on, making, built, build = threading.Event(), [], [], page.build

    def stream(self, *args, **kwargs):
        making.append(1)
        assert goes_on.wait(60)
        yield np.zeros((*shape_of(self.image_size), 3), np.uint8)
        making.pop()

    def press(session):
        data = [*vars(Settings.default(model)).values()]
        sent = {"data": data, "fn_index": pressed["id"], "session_hash": session}
        body, kind = json.dumps(sent).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}gradio_api/queue/join", body, kind)
        urllib.request.urlopen(request, timeout=60).close()
        data = f"{address}gradio_api/queue/data?session_hash={session}"
        return urllib.request.urlopen(data, timeout=60)

    def generator(f):
        def handler(*args):
            yield from f(*args)

        return handler

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(var_jax.Model, "stream", stream)
    monkeypatch.setattr(page, "build", lambda *args: built.append(build(*args)) or built[0])
    monkeypatch.setattr(page, "with_messages", generator)  # type checks hide from gradio what it is
    app, listening = page.web_app(model, "tiny", None), socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    config = json.load(urllib.request.urlopen(address + "config", timeout=60))
    button = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "sample")
    pressed = next(d for d in config["dependencies"] if [button, "click"] in d["targets"])
    yield press, making, goes_on, built[0].state_holder
    goes_on.set()
    server.should_exit = True
    thread.join(60)


def test_images_are_sampled_one_after_the_other_and_few_wait(queue):
    press, making, goes_on, _ = queue
    answers, most = [], page.MAX_WAITING
    with pytest.raises(urllib.error.HTTPError, match="503"):  # as many wait as may
        for number in range(most + 2):
            answers.append(press(f"visitor{number}"))
            for _ in range(6000):
                if making:
                    break
                time.sleep(0.01)
    assert len(answers) == most + 1 and len(making) == 1
    goes_on.set()
    for answer in answers:
        text = answer.read().decode()
        assert '"msg":"process_completed"' in text and '"success":true' in text
    assert not making


def test_of_many_visitors_the_last_are_kept(queue):
    press, _, goes_on, visitors = queue
    assert visitors.capacity == page.MAX_SESSIONS
    visitors.capacity = 3  # so that five visitors are enough
    goes_on.set()
    for number in range(5):
        assert '"success":true' in press(f"visitor{number}").read().decode()
    assert [*visitors.session_data] == ["visitor2", "visitor3", "visitor4"]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "apt-get install chromium"
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address):
    """An open page; all that it loads comes from this machine, and nothing goes wrong in it."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(120_000)
    errors, hosts = [], set()
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).netloc))
    tab.goto(address + "?class=Flags&seed=5&top_p=0.9")
    yield tab
    tab.close()
    assert not errors
    assert hosts <= {urllib.parse.urlsplit(address).netloc, ""}


def shown(tab, where):
    """The image in a part of the page."""
    source = tab.locator(f"#{where} img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(tab.request.get(source).body())).convert("RGB"))


def wait_for_strip(tab, where, count):
    """Waits until so many images of a strip are there."""
    tab.wait_for_function(f"document.querySelectorAll('#{where} .scales img').length == {count}")


@pytest.mark.slow
def test_each_scale_is_sent_as_it_is_made(loaded):
    sent = list(page.Handlers(loaded).sample(8, 5, 1.5, 0, "0.9", 0.25))
    assert [strip.count("<img") for _, strip, _ in sent[:-1]] == [0, 1, 2, 3]
    stages = list(loaded.stream("Flags", seed=5, cfg=1.5, top_k=0, top_p=0.9))
    for (image, _, _), stage in zip(sent[1:-1], stages, strict=True):
        np.testing.assert_array_equal(image, stage)
    # "Edit this image" takes the finished one: none while it is made, then the last.
    assert sent[0][2] is None
    assert all(finished == page.gr.skip() for _, _, finished in sent[1:-1])
    np.testing.assert_array_equal(sent[-1][2], stages[-1])


def test_an_image_that_is_not_finished_is_not_edited(model):
    with pytest.raises(BadInput, match="no finished image yet"):
        next(page.Handlers(model).take(None))


def upload(tab, path):
    """Chooses a file of this machine."""
    with tab.expect_file_chooser() as chooser:
        tab.locator("#upload").click()
    chooser.value.set_files(path)


@pytest.mark.slow
def test_a_visitor_samples(tab, loaded):
    wait_for_strip(tab, "sampled_scales", 3)  # the link's own image
    wanted = loaded.sample("Flags", seed=5, top_p=0.9)[0]
    np.testing.assert_allclose(shown(tab, "sampled").astype(int), wanted.astype(int), atol=1)
    tab.evaluate("""() => {
        window.counts = new Set();
        const strip = document.querySelector("#sampled_scales");
        const count = () => window.counts.add(strip.querySelectorAll(".scales img").length);
        new MutationObserver(count).observe(strip, {childList: true, subtree: true});
    }""")
    tab.get_by_label("Class").click()
    tab.get_by_role("option", name="Symbols").click()
    tab.get_by_label("Seed", exact=True).fill("11")
    tab.locator("#top_p textarea, #top_p input").fill("0.5")
    tab.locator("#sample").click()
    tab.wait_for_function("window.counts.has(0) && window.counts.has(3)")  # others may be too short
    tab.wait_for_function("location.search.includes('seed=11')")
    link = tab.locator("#link textarea, #link input").input_value()
    assert urllib.parse.urlsplit(link).query.startswith("class=7&seed=11&")
    tab.goto(link)
    wait_for_strip(tab, "sampled_scales", 3)
    assert tab.get_by_label("Class").input_value() == "Symbols"
    assert tab.locator("#top_p textarea, #top_p input").input_value() == "0.5"
    wanted = loaded.sample("Symbols", seed=11, top_p=0.5)[0]
    np.testing.assert_allclose(shown(tab, "sampled").astype(int), wanted.astype(int), atol=1)


def wait_for_image(tab, name, wanted):
    """Waits until the page shows these pixels: on a busy machine the image before stays longer."""
    for _ in range(120):
        image = shown(tab, name).astype(int)
        if image.shape == wanted.shape and np.abs(image - wanted).max() <= 1:
            return
        tab.wait_for_timeout(500)
    np.testing.assert_allclose(image, wanted.astype(int), atol=1)


@pytest.mark.slow
def test_a_visitor_edits(tab, loaded, tmp_path):
    wait_for_strip(tab, "sampled_scales", 3)
    tab.get_by_role("tab", name="Edit").click()
    tab.locator("#repaint").click()
    tab.get_by_text("there is no image to edit yet").wait_for()
    (tmp_path / "a.png").write_bytes(b"none")
    upload(tab, tmp_path / "a.png")
    tab.get_by_text("a.png cannot be read").wait_for()
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "noise.png")
    upload(tab, tmp_path / "noise.png")
    image = np.asarray(loaded.crop(tmp_path / "noise.png"))
    canvas = tab.locator("#editor canvas").first
    canvas.wait_for()
    tab.wait_for_timeout(2000)  # the editor draws
    box = canvas.bounding_box()
    x, y = (box[a] + box[b] / 2 for a, b in (("x", "width"), ("y", "height")))
    tab.mouse.move(x - 60, y - 60)
    tab.mouse.down()
    for step in range(-60, 1, 10):
        tab.mouse.move(x + step, y + step, steps=3)
    tab.mouse.up()
    tab.locator("#repaint").click()
    wait_for_strip(tab, "edited_scales", 4)
    mask = np.zeros((16, 16), bool)
    mask[4:8, 4:8] = True
    wanted = loaded.edit(image, mask, label="Flags", seed=5, top_p=0.9)[0]
    wait_for_image(tab, "edited", wanted)
    tab.get_by_label("the margin").click()
    tab.locator("#repaint").click()
    tab.wait_for_timeout(1000)
    wait_for_strip(tab, "edited_scales", 4)
    mask = page.in_margin(0.25, loaded)
    wanted = loaded.edit(image, mask, label="Flags", seed=5, top_p=0.9)[0]
    wait_for_image(tab, "edited", wanted)
    with tab.expect_download() as download:
        tab.locator("#edited").get_by_label("Download").click()
    assert Image.open(download.value.path()).size == (16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("gradio",), ("gradio", "fastapi")])
def test_without_gradio(tmp_path, names):
    """One sentence with the command that installs it and what it brings."""
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    process = start("demo", "--checkpoint", "emoji", "--port", 0, cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, len(err.splitlines())) == (2, 1), err
    assert "pip install 'var_jax[demo]'" in err
