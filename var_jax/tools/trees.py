"""Names of the leaves of a pytree."""

from typing import Any

import jax


def path_name(path: tuple) -> str:
    """A leaf's place in a model as text, like "blocks.qkv"."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def flatten(tree: Any) -> dict[str, Any]:
    """{"path/of/leaf": leaf}, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    assert len(flat) == len(leaves), "two leaves have the same path"
    return flat
