"""Names of the ImageNet classes, which the official weights know by number."""

from importlib import resources


def class_names(count: int) -> tuple[str, ...]:
    """A name for each class 0..count-1: ImageNet's, in wnid order, for 1000; else its number."""
    if count != 1000:
        return tuple(map(str, range(count)))
    file = resources.files("var_jax") / "data" / "assets" / "imagenet_classes.txt"
    return tuple(file.read_text().splitlines())
