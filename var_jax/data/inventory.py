"""What the images of a run are: counts for people, digests by which a later start knows them."""

import collections
import itertools
import json
import os
import sys
import zlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from var_jax import BadInput
from var_jax.data.records import images_checksum, sound
from var_jax.data.sources import ArraySource, Emoji, EncodedImages, ImageSource, Source
from var_jax.tools.files import replacing


def describe_data(source: Source) -> dict[str, Any]:
    """The number of images in a split, and digests of names and sizes and of 64 images' contents.

    None where a source does not know names. Where the images lie makes no difference.
    """
    images = source.encoded if isinstance(source, ImageSource) else None
    files = [os.fsencode(name) for name in images.names] if images else []
    files += [str(size).encode() for size in images.sizes] if images else []
    digest = f"{zlib.crc32(bytes(1).join(files)):08x}" if files else None
    return {"images": len(source), "files": digest, "contents": checksum_of(source)}


def checksum_of(source: Source) -> str:
    """The checksum of a source's images as they are stored, whatever their size later."""
    if isinstance(source, ImageSource):
        return images_checksum(len(source), source.encoded.load)
    assert isinstance(source, ArraySource)
    return images_checksum(len(source), lambda i: (source.images[i].tobytes(), source.labels[i]))


def summarize(name: str, splits: Mapping[str, Source | EncodedImages]) -> str:
    """A line that says how many images and classes there are, and what was left out and why."""
    counts = " and ".join(f"{len(source):,} {split}" for split, source in splits.items())
    classes = len(next(iter(splits.values())).class_names)
    line = f"{name}: {counts} images of {classes:,} class{'es' * (classes != 1)}"
    left_out = {}
    for source in splits.values():
        images = source.encoded if isinstance(source, ImageSource) else source
        left_out |= images.left_out if isinstance(images, EncodedImages) else {}
    if not left_out:
        return line
    reasons = collections.Counter(left_out.values()).most_common()
    first = {why: path for path, why in reversed(left_out.items())}
    some = ", ".join(f"{n:,} {why} ({first[why]!r}{', ...' * (n > 1)})" for why, n in reasons)
    return f"{line}; left out: {some}"


def remember(path: epath.Path, splits: Mapping[str, Source], *, begun: bool) -> None:
    """Adds what the images are to the list in `path`, unless that ends with them; tells a change.

    `begun` says that the run has made steps before.

    Raises: BadInput if its classes have changed: labels would not mean what they did.
    """
    now: dict[str, Any] = {split: describe_data(source) for split, source in splits.items()}
    now["classes"] = list(next(iter(splits.values())).class_names)
    with sound(path, "remove it, and the next start writes it anew"):
        past = json.loads(path.read_text()) if path.exists() else []
        before = past[-1] if past else now
        pairs = itertools.zip_longest(before["classes"], now["classes"])
        changed = [split for split in splits if _differ(before[split], now[split])]
    other = next(((then, here) for then, here in pairs if then != here), None)
    if other and begun:
        raise BadInput(
            f"{path.parent} belongs to a run on {len(before['classes'])} classes, these images have"
            f" {len(now['classes'])}, with {other[1]!r} for {other[0]!r}; name another --workdir."
        )
    if past and before == now:
        return
    for split in changed if begun else ():
        then, here = before[split]["images"], now[split]["images"]
        print(
            f"warning: {path.parent} has other {split} images than before ({then:,} then, {here:,}"
            " now): its numbers are not those of a run never stopped",
            file=sys.stderr,
        )
    if begun and not past and not isinstance(splits["train"], Emoji):
        print(
            f"warning: {path.parent} was begun by an older version, which kept no record of its"
            " images; where a tenth is held out, it is another tenth now",
            file=sys.stderr,
        )
    with replacing(path) as beside:
        beside.write_text(json.dumps([*past, now], indent=1) + "\n")


def _differ(then: dict[str, Any], now: dict[str, Any]) -> bool:
    return any(then[name] != now[name] for name in now if None not in (then[name], now[name]))
