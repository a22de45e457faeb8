"""Configuration of the documentation site: `make docs`, then open docs/_build/index.html."""

import sys
from pathlib import Path
from typing import Any

from flax import nnx
from sphinx.util.inspect import signature, stringify_signature

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package need not be installed

import micro_dit

project = "micro_dit"
author = copyright = "The micro_dit authors"
release = version = micro_dit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # the anchors that GitHub derives from headings

default_role = "py:obj"  # `name` in a docstring links to the entry of that name, if there is one
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
maximum_signature_line_length = 100
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"micro_dit {release}"
html_copy_source = False
html_show_sphinx = False

# Pages of the site that include a file from outside docs/. Links to the file lead to the page.
INCLUDED = {
    "../README.md": "index.md", "../CONTRIBUTING.md": "contributing.md", "../CHANGELOG.md": "changelog.md",
    "../benchmarks/RESULTS.md": "benchmarks.md",
}  # fmt: skip


def link_to_pages(app: Any, page: str, source: list[str]) -> None:
    """Replaces links to included files by links to the pages that include them."""
    for file, target in INCLUDED.items():
        source[0] = source[0].replace(f"]({file}", f"]({target}")


def signature_of_module(app: Any, what: str, name: str, entry: Any, *_: Any) -> tuple[str, None] | None:
    """Returns the signature of a Flax module's constructor, which its metaclass hides."""
    if what != "class" or not issubclass(entry, nnx.Module):
        return None
    shown = signature(entry.__init__, bound_method=True)
    parameters = [  # a function or class as a default has no readable text
        p.replace(default=...) if p.default is not p.empty and callable(p.default) else p
        for p in shown.parameters.values()
    ]
    return stringify_signature(shown.replace(parameters=parameters), unqualified_typehints=True), None


def setup(app: Any) -> None:
    """Registers the two functions above with Sphinx."""
    app.connect("autodoc-process-signature", signature_of_module)
    app.connect("source-read", link_to_pages)
