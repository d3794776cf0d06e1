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
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from var_jax import BadInput
from var_jax.data.sources.emoji import CELL, COLUMNS

EXPECTED = "emoji-datasource-google@16.0.0"
IMAGES = "package/img/google/64/"
USED = (IMAGES, "package/package.json", "package/emoji.json", "package/LICENSE")
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
            members = [member for member in tar if member.name.startswith(USED)]
            files = {m.name: tar.extractfile(m).read() for m in members}  # type: ignore
        about = json.loads(files["package/package.json"])
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError) as error:
        found = "is damaged or something else" if package.is_file() else "is not a file"
        raise BadInput(f"{package} {found}; expected the npm tarball of {EXPECTED}.") from error
    if (found := f"{about['name']}@{about['version']}") != EXPECTED:
        raise BadInput(f"{package} holds {found}; expected {EXPECTED}.")
    # Components are the bare skin-tone swatches.
    kept = lambda entry: entry["has_img_google"] and entry["category"] != "Component"
    entries = sorted(
        filter(kept, json.loads(files["package/emoji.json"])), key=lambda entry: entry["sort_order"]
    )
    out.mkdir(parents=True, exist_ok=True)
    images = [Image.open(io.BytesIO(files[IMAGES + entry["image"]])) for entry in entries]
    _sheet(images).save(out / "emoji.webp", quality=QUALITY, method=6)
    (out / "emoji.json").write_text(_index(entries))
    (out / "emoji.NOTICE").write_text(NOTICE + files["package/LICENSE"].decode())
    return len(entries)


def _sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All images on white, `COLUMNS` to a row."""
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, COLUMNS)
        sheet.alpha_composite(image.convert("RGBA"), (column * CELL, row * CELL))
    return sheet.convert("RGB")


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
