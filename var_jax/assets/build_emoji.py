"""Build the embedded emoji set: 1,906 Noto images in the 9 groups of Unicode.

    npm pack emoji-datasource-google@16.0.0
    python -m var_jax.assets.build_emoji emoji-datasource-google-16.0.0.tgz

writes `emoji.webp` (one sheet of 64×64 cells, row by row), `emoji.json` (names and classes, in the
order of the cells) and `emoji.NOTICE`. The same package and Pillow give the same bytes.

Skin-tone variants are left out, near-duplicates are not: 24 clock faces, and man, woman and person
of most jobs and gestures. Some of them lie on both sides of the validation split.
"""

import io
import json
import sys
import tarfile
import zlib
from pathlib import Path

from PIL import Image

from var_jax import BadInput
from var_jax.data.sources.emoji import CELL, COLUMNS
from var_jax.tools.files import replacing

EXPECTED = "emoji-datasource-google@16.0.0"
QUALITY = 90

NOTICE = """\
emoji.webp and emoji.json are built from the npm package emoji-datasource-google 16.0.0
by `python -m var_jax.assets.build_emoji`.

Images (emoji.webp): Noto Emoji, copyright Google LLC, licensed under the Apache License,
Version 2.0. You may obtain a copy of the license at https://www.apache.org/licenses/LICENSE-2.0
Modified: 1,906 of the 64x64 images were composited on white, laid out as one sheet and
compressed as lossy WebP.

Names and classes (emoji.json): emoji-data by Cal Henderson, reduced to the short name, category
and subcategory of each image, under this license:

"""


def build(package: Path, out: Path) -> int:
    """Write the three files to `out` and return the number of images.

    Raises: BadInput if `package` is not the tarball of emoji-datasource-google 16.0.0.
    """
    try:
        with tarfile.open(package) as tar:
            entries, images, license_text = _read(tar)
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError) as error:
        found = "is damaged or something else" if package.is_file() else "is not a file"
        raise BadInput(f"{package} {found}; expected the npm tarball of {EXPECTED}.") from error
    outputs = {
        "emoji.webp": _sheet(images),
        "emoji.json": _index(entries).encode(),
        "emoji.NOTICE": (NOTICE + license_text).encode(),
    }
    for name, content in outputs.items():
        with replacing(out / name) as beside:
            beside.write_bytes(content)
    return len(entries)


def _read(tar: tarfile.TarFile) -> tuple[list[dict], list[Image.Image], str]:
    """The entries in Unicode order, their images, and the license of the metadata."""
    members = {member.name: member for member in tar.getmembers()}  # one pass over the gzip stream

    def content(path: str) -> bytes:
        file = tar.extractfile(members[path])
        assert file is not None, f"{path} is not a file"
        return file.read()

    about = json.loads(content("package/package.json"))
    found = f"{about['name']}@{about['version']}"
    if found != EXPECTED:
        raise BadInput(f"{tar.name} holds {found}; expected {EXPECTED}.")
    entries = [
        entry
        for entry in json.loads(content("package/emoji.json"))
        # Components are the bare skin-tone swatches.
        if entry["has_img_google"] and entry["category"] != "Component"
    ]
    # Tarballs are gzip streams: reading in stored order never seeks back.
    stored = sorted(entries, key=lambda e: members[_path(e)].offset)
    images = {e["image"]: Image.open(io.BytesIO(content(_path(e)))) for e in stored}
    entries.sort(key=lambda entry: entry["sort_order"])
    return (
        entries,
        [images[entry["image"]] for entry in entries],
        content("package/LICENSE").decode(),
    )


def _path(entry: dict) -> str:
    return f"package/img/google/64/{entry['image']}"


def _sheet(images: list[Image.Image]) -> bytes:
    """All images on white, `COLUMNS` to a row, as one WebP."""
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, COLUMNS)
        sheet.alpha_composite(image.convert("RGBA"), (column * CELL, row * CELL))
    file = io.BytesIO()
    sheet.convert("RGB").save(file, "WEBP", quality=QUALITY, method=6)
    return file.getvalue()


def _index(entries: list[dict]) -> str:
    """Names and classes as JSON; groups and subgroups are numbered in Unicode order."""
    groups = list(dict.fromkeys(entry["category"] for entry in entries))
    subgroups = list(dict.fromkeys(entry["subcategory"] for entry in entries))
    index = {
        "groups": groups,
        "subgroups": subgroups,
        "name": [entry["short_name"] for entry in entries],
        "group": [groups.index(entry["category"]) for entry in entries],
        "subgroup": [subgroups.index(entry["subcategory"]) for entry in entries],
    }
    return json.dumps(index, separators=(",", ":")) + "\n"


if __name__ == "__main__":
    print(f"{build(Path(sys.argv[1]), Path(__file__).parent)} images")
