"""What the images of a run are: counts for people, digests by which a later start knows them."""

import collections
import json
import sys
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from var_jax import BadInput
from var_jax.data.records import checksum
from var_jax.data.sources import ArraySource, Emoji, ImageSource, Source
from var_jax.tools.files import replacing

ABOUT = {"images": "number", "checksum": "contents", "names": "names", "sizes": "sizes"}


def describe_data(source: Source) -> dict[str, Any]:
    """The number of images in a split, a checksum of 64 of them, and digests of names and sizes.

    None where a source does not know names or sizes. Where the images lie makes no difference.
    """
    images = source.encoded if isinstance(source, ImageSource) else None
    about = {"images": len(source), "checksum": checksum_of(source), "names": None, "sizes": None}
    if images and images.names:
        about["names"] = _digest(images.names)
    if images and images.sizes:
        about["sizes"] = _digest(map(str, images.sizes))
    return about


def checksum_of(source: Source) -> str:
    """The checksum of a source's images as they are stored, whatever their size later."""
    if isinstance(source, ImageSource):
        return checksum(len(source), source.encoded.load)
    assert isinstance(source, ArraySource)
    return checksum(len(source), lambda i: (source.images[i].tobytes(), source.labels[i]))


def count(name: str, splits: Mapping[str, Source]) -> str:
    """A line that says how many images and classes there are, and what was left out and why."""
    counts = " and ".join(f"{len(source):,} {split}" for split, source in splits.items())
    classes = len(next(iter(splits.values())).class_names)
    line = f"{name}: {counts} images of {classes:,} class{'es' * (classes != 1)}"
    left_out = {}
    for source in splits.values():
        encoded = source.encoded if isinstance(source, ImageSource) else source
        left_out |= getattr(encoded, "left_out", {})
    if not left_out:
        return line
    reasons = collections.Counter(left_out.values()).most_common()
    first = {why: path for path, why in reversed(left_out.items())}
    some = ", ".join(f"{n:,} {why} ({first[why]!r}{', ...' * (n > 1)})" for why, n in reasons)
    return f"{line}; left out: {some}"


def remember(path: epath.Path, splits: Mapping[str, Source], *, begun: bool) -> None:
    """Adds what the images are to the list in `path`, unless that ends with them; tells a change.

    `begun` says that the run has made steps before.

    Raises: BadInput if the classes have changed: labels would not mean what they did.
    """
    now: dict[str, Any] = {split: describe_data(source) for split, source in splits.items()}
    now["classes"] = list(next(iter(splits.values())).class_names)
    past = json.loads(path.read_text()) if path.exists() else []
    if past and past[-1]["classes"] != now["classes"]:
        raise BadInput(
            f"{path.parent} belongs to a run on {_classes(past[-1], now)}; name another --workdir."
        )
    if jax.process_index() or (past and past[-1] == now):
        return
    if begun and past:
        for change in _changes(past[-1], now, splits):
            sys.stderr.write(f"warning: {path.parent} was begun with other images: {change}\n")
    elif begun and not isinstance(splits["train"], Emoji):
        sys.stderr.write(
            f"warning: {path.parent} was begun by an older version, which kept no record of its"
            " images; where a tenth is held out, it is another tenth now\n"
        )
    with replacing(path) as beside:
        beside.write_text(json.dumps([*past, now], indent=1) + "\n")


def _changes(then: dict, now: dict, splits: Iterable[str]) -> Iterable[str]:
    for split in splits:
        old, new = then[split], now[split]
        known = [name for name in ABOUT if old[name] is not None and new[name] is not None]
        if what := [ABOUT[name] for name in known if old[name] != new[name]]:
            yield (
                f"{split} had {old['images']:,} and has {new['images']:,} ({', '.join(what)}"
                " differ); its numbers are not those of a run never stopped"
            )


def _classes(then: dict, now: dict) -> str:
    """How classes differ, as text."""
    old, new = (dict.fromkeys(about["classes"]) for about in (then, now))
    gone, added = [n for n in old if n not in new], [n for n in new if n not in old]
    text = f"{len(old)} classes, these images have {len(new)}"
    if gone or added:
        text += f" (gone: {', '.join(gone[:3]) or 'none'}; new: {', '.join(added[:3]) or 'none'})"
    return text if gone or added else f"{text}, in another order"


def _digest(texts: Iterable[str]) -> str:
    value = 0
    for text in texts:
        value = zlib.crc32(text.encode("utf-8", "surrogateescape") + b"\0", value)
    return f"{value:08x}"
