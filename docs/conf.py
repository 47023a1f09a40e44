"""Sphinx: ``sphinx-build -W docs build/docs``; every warning is an error."""

import shutil
from pathlib import Path

import fastclust

HERE = Path(__file__).parent

project = "fastclust"
author = "the fastclust authors"
copyright = "2026, the fastclust authors"
version = release = fastclust.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"fastclust {release}"
html_static_path: list[str] = []
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#2a6fc4", "color-brand-content": "#2a6fc4"},
    "dark_css_variables": {"color-brand-primary": "#6aa9f4", "color-brand-content": "#6aa9f4"},
}

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say them in words
napoleon_numpy_docstring = True
napoleon_google_docstring = True

# A reference to a function, module or attribute that these pages lack fails the build. What stands
# as a type in numpydoc sections is not looked up: types are words ("path", "array [N, D]") as often
# as classes, and errors are given by their short names.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", ".*"),
    ("py:exc", ".*"),
]

# The measured results live beside the benchmarks; these pages are made of the same files, and of
# those here that report a measurement.
MEASURED = HERE / "measured"
shutil.rmtree(MEASURED, ignore_errors=True)
MEASURED.mkdir()
for path in sorted((HERE.parent / "benchmarks" / "results").glob("*.md")):
    shutil.copy(path, MEASURED / path.name)
reports = ("results", "scale", "reliability")
pages = [f"../{page}" for page in reports if (HERE / f"{page}.md").is_file()]
pages += sorted(path.stem for path in MEASURED.glob("*.md"))
(MEASURED / "index.md").write_text(
    "# Measured\n\nWhat was measured, where, when and with which command.\n\n"
    "```{toctree}\n:maxdepth: 1\n\n" + "\n".join(pages) + "\n```\n"
)
