"""Settings of Sphinx. The pages are collected by `docs/site.py`, which `make docs` runs; nothing is loaded from a network."""

from importlib import metadata

project = "labkit"
author = "labkit contributors"
release = metadata.version("labkit")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

root_doc = "README"
default_role = "code"
exclude_patterns = ["**/_*", "**/.*"]
suppress_warnings = [
    "myst.header",  # the README begins some parts two levels down
    "mystnb.unknown_mime_type",  # a figure holds the same for JupyterLab alone
    "docutils",  # docstrings are plain text with some of its marks
    "ref.python",  # two modules with a name in common
    "misc.highlighting_failure",
]

nb_execution_mode = "off"  # `docs/site.py` has executed them
nb_merge_streams = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
myst_fence_as_directive = []

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"labkit {release}"
html_show_sphinx = False
