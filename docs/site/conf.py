"""The rendered site, which `make site` builds from README, notebooks and docs as they stand.

Nothing is executed: the notebooks are committed with their outputs.
"""

import re

project = "Parallel inference with KServe and Ray Serve"
author = "its authors"
html_title = project
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
extensions = ["myst_nb", "sphinx_copybutton"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "notebooks/*.ipynb",
    "docs/*.md",
    "deploy/README.md",
]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # of outputs; the default knows no tables
myst_heading_anchors = 4
html_show_sphinx = False
html_copy_source = False

CONTENTS = """
```{toctree}
:caption: Notebooks
:hidden:
:glob:

notebooks/*
```

```{toctree}
:caption: Pages
:hidden:
:glob:

docs/*
deploy/README
CONTRIBUTING
CHANGELOG
```
"""


def on_source(app, name: str, source: list[str]) -> None:
    """README gets the table of contents, and loses the badges, which only GitHub can resolve."""
    if name == root_doc:
        source[0] = re.sub(r"^\[!\[.*badge.svg.*\n", "", source[0], flags=re.M) + CONTENTS


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("source-read", on_source)
