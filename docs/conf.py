"""How Sphinx builds the documentation: sphinx-build -W docs docs/_build"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import from_code

import var_jax

project = "var_jax"
author = copyright = "The var_jax authors"
release = version = var_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "none"
smartquotes = False  # -- stays -- in the help of a flag
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = "var_jax"
html_static_path = ["_static"]
html_css_files = ["custom.css"]


def fill(app, docname: str, source: list[str]) -> None:
    """Appends to a page what is made from the code."""
    if docname in from_code.PAGES:
        source[0] += from_code.PAGES[docname]()


def setup(app) -> None:
    app.connect("source-read", fill)
