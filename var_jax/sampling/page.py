"""The demo's web page, with gradio: samples and edits, each shown scale by scale as it is made."""

import base64
import contextlib
import dataclasses
import hmac
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastapi
import gradio as gr
import numpy as np
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from gradio.themes import Soft
from jaxtyping import Bool, UInt8
from PIL import Image

from var_jax import BadInput
from var_jax.config import MAX_SEED, listed
from var_jax.data.decoding import Unreadable, decode
from var_jax.sampling.masks import box_mask, enlarge_mask
from var_jax.schedule import Size, shape_of
from var_jax.tools.images import before_and_after

if TYPE_CHECKING:
    from var_jax import Model

MAX_BYTES = 10 * 2**20  # of an upload
MAX_KEPT = 200 * 2**20  # bytes of uploads and images that the page keeps in files
MAX_WAITING = 16  # requests
MAX_SESSIONS = 100  # whose images are kept
MAX_PIXELS = 50_000_000  # of an upload, and of what a browser sends
CANVAS = 512  # longer side of what is brushed on, in pixels
BRUSHED = 0.25  # share of a cell that a stroke must cover to have it repainted
NO_CLASS = -1
# The least and the most that a control of a number takes.
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, MAX_SEED),
    "cfg": (0, 10),
    "margin": (0.05, 0.45),
}
BRUSH, MARGIN = "where I brush", "the margin"
THEME = Soft(primary_hue="indigo", font=("system-ui", "sans-serif"), font_mono=("monospace",))
CSS = """
.pixels img { image-rendering: pixelated; object-fit: contain !important; width: 100%;
  height: 100% }
.scales { display: flex; gap: 6px; min-height: 60px }
.scales figure { flex: 1 1 0; max-width: 96px; margin: 0; text-align: center; font-size: 12px }
.scales img, .scales span { display: block; width: 100%; aspect-ratio: 1; border-radius: 6px;
  image-rendering: pixelated; background: rgba(128, 128, 128, .15); margin-bottom: 2px }
"""
# The address bar holds the settings, so that a bookmark does too.
LINK = """(...values) => {
  const names = ["class", "seed", "cfg", "top_k", "top_p", "margin"];
  const query = new URLSearchParams(names.map((name, i) => [name, values[i]]));
  history.replaceState(null, "", "?" + query);
  return location.href;
}"""
NEW_SEED = f"() => Math.floor(Math.random() * {MAX_SEED})"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the page's controls hold, in their order; a link has them by name."""

    label: int  # NO_CLASS: none
    seed: int
    cfg: float
    top_k: str  # one number, or one a scale, with commas
    top_p: str  # alike
    margin: float  # share of the side

    @classmethod
    def default(cls, model: "Model") -> "Settings":
        """The first class and what the checkpoint says."""
        settings = model.settings(top_k=model.settings().top_k)  # 0 for as many as there are codes
        return cls(0, 0, settings.cfg, listed(settings.top_k), listed(settings.top_p), 0.25)

    @classmethod
    def of(cls, model: "Model", values: Mapping[str, Any]) -> "Settings":
        """Settings of the page, or of a link, whose text becomes numbers; the others by default.

        Raises: BadInput, naming what is out of range.
        """
        found = dict(vars(cls.default(model)))
        for name in found.keys() & values.keys():
            found[name] = to_number(name, values[name], type(found[name]))
        settings = cls(**found)
        settings.sampling(model)
        for name, (least, most) in LIMITS.items():
            if not least <= (value := getattr(settings, name)) <= most:
                raise BadInput(f"{name}={value}; expected {least} to {most}.")
        return settings

    @classmethod
    def of_link(cls, model: "Model", query: Mapping[str, str]) -> "Settings":
        """The settings in a link, which has the label as "class", a name or number."""
        values = dict(query)
        if (name := values.pop("class", None)) is not None:
            none = name == str(NO_CLASS)
            label = int(name) if re.fullmatch(r"\d{1,9}", name) else name  # links hold numbers
            values["label"] = name if none else str(model.class_index(label, "class"))
        return cls.of(model, values)

    def sampling(self, model: "Model") -> dict[str, Any]:
        """The arguments of `Model.stream`. Raises: BadInput if one is out of range."""
        options: dict[str, Any] = {"cfg": self.cfg}
        for name, kind in (("top_k", int), ("top_p", float)):
            texts = getattr(self, name).split(",")
            options[name] = tuple(to_number(name, text, kind) for text in texts)
        model.settings(**options)
        label = None if self.label == NO_CLASS else self.label
        return {"label": label, "seed": self.seed, **options}


def to_number(name: str, text: Any, kind: type) -> Any:
    """Text as a number of a kind. Raises: BadInput for anything else."""
    try:
        return kind(text)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadInput(f"{name}={str(text)[:40]!r}; expected a number.") from error


def read_upload(path: str, model: "Model") -> UInt8[np.ndarray, "H W 3"]:
    """An uploaded image as the model takes it. Raises: BadInput if it is none, or too large."""
    name, size = Path(path).name[:60], Path(path).stat().st_size
    if size > MAX_BYTES:
        raise BadInput(f"{name} has {size:,} bytes; expected at most {MAX_BYTES:,}.")
    short = max(shape_of(model.image_size))
    try:
        return np.asarray(model.crop(decode(Path(path).read_bytes(), short)))
    except Unreadable as error:
        raise BadInput(f"{name} cannot be read: {error}.") from error


def brushed(strokes: UInt8[np.ndarray, "S T 4"] | None, model: "Model") -> Bool[np.ndarray, "H W"]:
    """The cells of the finest scale that strokes touch, as a mask of the model's size.

    Raises: BadInput if there are none.
    """
    (height, width), mask = shape_of(model.patch_nums[-1]), np.zeros((1, 1), bool)
    if strokes is not None and strokes.ndim == 3:
        alpha = Image.fromarray(np.ascontiguousarray(strokes[..., -1]))
        share = np.asarray(alpha.resize((width, height), Image.Resampling.BOX)) / 255
        mask = share >= BRUSHED
    if not mask.any():
        raise BadInput("nothing is brushed yet; brush over what is to be painted anew.")
    return enlarge_mask(mask, model.image_size)


def in_margin(margin: float, model: "Model") -> Bool[np.ndarray, "H W"]:
    """The cells outside a box that keeps this distance from the edges, as a mask."""
    mask = ~box_mask((margin, margin, 1 - margin, 1 - margin), model.patch_nums[-1])
    if not mask.any():
        raise BadInput(f"a margin of {margin} is less than half a cell; expected more.")
    return enlarge_mask(mask, model.image_size)


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """An image with larger pixels, whose longer edge is about `side`."""
    times = max(1, side // max(image.shape[:2]))
    return image.repeat(times, 0).repeat(times, 1)


def in_html(size: Size) -> str:
    """A size in HTML, height first."""
    return "&times;".join(map(str, shape_of(size)))


def strip(
    model: "Model", images: list[np.ndarray], masked: UInt8[np.ndarray, "H W 3"] | None = None
) -> str:
    """HTML of the images after each scale so far, and empty places for those to come."""
    figures = [] if masked is None else [figure(masked, "to repaint")]
    for k, size in enumerate(model.patch_nums):
        figures.append(figure(images[k] if k < len(images) else None, in_html(size)))
    return f'<div class="scales">{"".join(figures)}</div>'


def figure(image: UInt8[np.ndarray, "H W 3"] | None, caption: str) -> str:
    """HTML of an image, or of an empty place, with a caption."""
    shown = "<span></span>"
    if image is not None:
        data, small = io.BytesIO(), Image.fromarray(np.asarray(image))
        small.thumbnail((136, 136))
        small.save(data, format="PNG")
        encoded = base64.b64encode(data.getvalue()).decode()
        shown = f'<img alt="{caption}" src="data:image/png;base64,{encoded}">'
    return f"<figure>{shown}{caption}</figure>"


def with_messages(f: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A handler whose `BadInput` becomes a message on the page."""

    def handler(*args):
        try:
            yield from f(*args)
        except BadInput as error:
            raise gr.Error(str(error), print_exception=False) from error

    return handler


class Handlers:
    """What the page's buttons do; each yields the values of its outputs as they change."""

    def __init__(self, model: "Model"):
        self.model = model

    def settings(self, values: tuple[Any, ...]) -> Settings:
        """What the controls say."""
        names = [field.name for field in dataclasses.fields(Settings)]
        return Settings.of(self.model, dict(zip(names, values, strict=True)))

    def sample(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The image and the strip, after each scale, and at the end the finished image."""
        settings = self.settings(values)
        yield from self.show(self.model.stream(**settings.sampling(self.model)))

    def edit(
        self, image: np.ndarray | None, editor: dict[str, Any] | None, where: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """The edited image and the strip, after each scale, and at the end the finished image."""
        settings = self.settings(values)
        if image is None:
            raise BadInput("there is no image to edit yet; upload one, or sample one.")
        if where == MARGIN:
            mask = in_margin(settings.margin, self.model)
        else:
            layers = (editor or {}).get("layers") or [None]
            mask = brushed(layers[0], self.model)
        options = settings.sampling(self.model)
        stages = self.model.stream(options.pop("label"), image, mask, **options)
        yield from self.show(stages, before_and_after(image, mask, image[None])[1])

    def show(
        self, stages: Iterator[np.ndarray], masked: np.ndarray | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Shows images as they come; until the last is there, none is finished."""
        images = []
        yield gr.skip(), strip(self.model, images, masked), None
        for image in stages:
            images.append(np.asarray(image))
            yield images[-1], strip(self.model, images, masked), gr.skip()
        yield gr.skip(), gr.skip(), images[-1]

    def upload(self, path: str) -> Iterator[tuple[Any, Any]]:
        """The image to edit, and what to brush on."""
        yield from self.take(read_upload(path, self.model))

    def take(self, image: np.ndarray | None) -> Iterator[tuple[Any, Any]]:
        """The same, of a finished image on the page."""
        if image is None:
            raise BadInput("there is no finished image yet, or it is kept no longer; make one.")
        yield image, {"background": enlarged(image, CANVAS), "layers": [], "composite": None}

    def restore(self, request: gr.Request) -> list[Any]:
        """The controls' values from the link that opened the page."""
        try:
            settings = Settings.of_link(self.model, dict(request.query_params))
        except BadInput as error:
            gr.Warning(f"the link cannot be followed: {error}")
            settings = Settings.default(self.model)
        return list(vars(settings).values())


class Bounded:
    """An application that takes no larger requests than an upload, and keeps few bytes in files."""

    def __init__(self, app: Any, folder: Path):
        self.app, self.folder, self.coming = app, folder, 0  # bytes of requests under way

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("method") != "POST":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        size = int(headers.get(b"content-length", 0))
        if refusal := self.refusal(headers, size):
            return await refusal(scope, receive, send)
        self.coming += size
        try:
            await run_in_threadpool(remove_oldest, self.folder, MAX_KEPT - self.coming)
            await self.app(scope, receive, send)
        finally:
            self.coming -= size

    def refusal(self, headers: dict[bytes, bytes], size: int) -> PlainTextResponse | None:
        """The answer to a request that is not taken."""
        if b"transfer-encoding" in headers:
            return PlainTextResponse("expected a Content-Length.", 411)
        if size > MAX_BYTES + 2**20:  # a file, and what surrounds it
            return PlainTextResponse(f"expected at most {MAX_BYTES:,} bytes.", 413)
        if self.coming + size > MAX_KEPT:
            return PlainTextResponse("too many uploads at once; try again.", 503)
        return None


def remove_oldest(folder: Path, most: int) -> None:
    """Removes the oldest files of a folder; the others have at most `most` bytes together."""
    found = []
    for path in (Path(place, name) for place, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(FileNotFoundError):  # gradio removes files too
            about = path.stat()
            found.append((about.st_mtime_ns, about.st_size, path))
    for _, size, path in sorted(found, reverse=True):
        if (most := most - size) < 0:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # which is not empty
                path.parent.rmdir()


def web_app(model: "Model", name: str, password: str | None) -> fastapi.FastAPI:
    """The page as a web application, for visitors who know the password if there is one.

    Uploads and images lie in the folder of the environment variable GRADIO_TEMP_DIR.
    """
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many
    blocks = build(model, name)
    blocks.state_session_capacity = MAX_SESSIONS
    check = lambda _, given: hmac.compare_digest(given.encode(), (password or "").encode())
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Bounded, folder=Path(os.environ["GRADIO_TEMP_DIR"]))
    return gr.mount_gradio_app(
        app, blocks, "/",
        auth=check if password else None, auth_message="Any name, and the password.",
        max_file_size=MAX_BYTES, allowed_paths=[], footer_links=[], run_history=False,
        ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, theme=THEME, css=CSS,
    )  # fmt: skip


def build(model: "Model", name: str) -> gr.Blocks:
    """The page of a checkpoint called `name`."""
    do = Handlers(model)
    with gr.Blocks(title=f"VAR: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            "# Images, one scale at a time\n"
            "VAR predicts an image from coarse to fine: each scale from all coarser ones. This"
            f" checkpoint, **{name}**, makes images of {in_html(model.image_size)} pixels in"
            f" {len(model.patch_nums)} scales; the finest has {in_html(model.patch_nums[-1])}"
            " tokens."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                controls = add_controls(model)
                link = gr.Textbox(label="Link to these settings", buttons=["copy"], elem_id="link")
            with gr.Column(scale=3, min_width=480), gr.Tabs() as tabs:
                with gr.Tab("Sample", id="sample"):
                    finished, sampled = add_samples(do, controls)
                    edit = gr.Button("Edit this image", size="sm")
                with gr.Tab("Edit", id="edit"):
                    editing = add_edits(do, controls)
        # In the model's queue, behind other visitors too: pressed while an image is made, it waits
        # and takes the whole one.
        taken = edit.click(with_messages(do.take), finished, editing, **HEAVY)
        taken.success(lambda: gr.Tabs(selected="edit"), None, tabs, **QUICK)
        gr.on([c.change for c in controls], None, controls, link, js=LINK)
        opened = page.load(do.restore, None, controls, **QUICK)
        opened.then(None, controls, link, js=LINK)
        opened.then(with_messages(do.sample), controls, sampled, **HEAVY)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


# Images are made one after the other, of all visitors; the rest does not wait for them.
HEAVY: Any = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
QUICK: Any = {"api_visibility": "private", "show_progress": "hidden"}


def add_controls(model: "Model") -> list[Any]:
    """The controls of `Settings`."""
    now, most = Settings.default(model), LIMITS
    classes = [("no class", NO_CLASS), *((n, i) for i, n in enumerate(model.class_names))]
    label = gr.Dropdown(classes, value=now.label, label="Class", filterable=True)
    with gr.Row(equal_height=True):
        seed = gr.Number(
            now.seed, label="Seed", info="Same seed, same image", precision=0,
            minimum=0, maximum=MAX_SEED, min_width=120, scale=2,
        )  # fmt: skip
        another = gr.Button("New seed", size="sm", min_width=80, scale=1)
    cfg = gr.Slider(
        *most["cfg"],
        now.cfg,
        step=0.1,
        label="Guidance",
        info="How strongly the class counts; 0: off",
    )
    top_k = gr.Textbox(
        now.top_k, label="Top-k", elem_id="top_k",
        info="Sample from the k likeliest codes, 0: all; one number, or one a scale",
    )  # fmt: skip
    top_p = gr.Textbox(
        now.top_p, label="Top-p", elem_id="top_p",
        info="Sample from this share of probability; one number, or one a scale",
    )  # fmt: skip
    margin = gr.Slider(
        *most["margin"], now.margin, step=0.05, label="Margin",
        info="For out-painting, as a share of the side", render=False,  # but where edits are made
    )  # fmt: skip
    another.click(None, None, seed, js=NEW_SEED)
    return [label, seed, cfg, top_k, top_p, margin]


def add_samples(do: Handlers, controls: list[Any]) -> tuple[gr.State, list[Any]]:
    """The tab that samples: its finished image, and what sampling changes."""
    button = gr.Button("Sample", variant="primary", elem_id="sample")
    image = gr.Image(
        label="Image", format="png", height=420, interactive=False, elem_classes="pixels",
        elem_id="sampled", buttons=["download", "fullscreen"],
    )  # fmt: skip
    scales = gr.HTML(strip(do.model, []), elem_id="sampled_scales")
    finished = gr.State(time_to_live=3600)
    outputs = [image, scales, finished]
    button.click(with_messages(do.sample), controls, outputs, **HEAVY)
    return finished, outputs


def add_edits(do: Handlers, controls: list[Any]) -> list[Any]:
    """The tab that edits: what an image to edit is put into."""
    original, finished = gr.State(time_to_live=3600), gr.State(time_to_live=3600)
    sides = shape_of(do.model.image_size)
    height, width = (CANVAS * side // max(sides) for side in sides)
    with gr.Row():
        with gr.Column(min_width=300):
            editor = gr.ImageEditor(
                label="Brush over it", sources=(), transforms=(),
                layers=False, brush=gr.Brush(60, ["#ff0080"], color_mode="fixed"), format="png",
                canvas_size=(width, height), fixed_canvas=True, height=460, elem_id="editor",
            )  # fmt: skip
            upload = gr.UploadButton("Upload an image", size="sm", elem_id="upload")
        with gr.Column(min_width=300):
            result = gr.Image(
                label="Result", format="png", height=420, interactive=False, elem_id="edited",
                elem_classes="pixels", buttons=["download", "fullscreen"],
            )  # fmt: skip
            again = gr.Button("Edit the result", size="sm")
    with gr.Row():
        where = gr.Radio([BRUSH, MARGIN], value=BRUSH, label="Repaint, as the class on the left")
        controls[-1].render()
    button = gr.Button("Repaint", variant="primary", elem_id="repaint")
    scales = gr.HTML(strip(do.model, []), elem_id="edited_scales")
    upload.upload(with_messages(do.upload), upload, [original, editor], **QUICK)
    again.click(with_messages(do.take), finished, [original, editor], **HEAVY)
    inputs = [original, editor, where, *controls]
    button.click(with_messages(do.edit), inputs, [result, scales, finished], **HEAVY)
    return [original, editor]
