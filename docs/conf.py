"""Configuration of the documentation; `make docs` builds it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "PruneForge"
author = "PruneForge developers"
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "generated"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "PruneForge"
html_static_path: list[str] = []

smartquotes_action = "D"  # dashes, but no quotes: they may be code
myst_heading_anchors = 3
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False

nitpick_ignore = [
    ("py:class", "types.Annotated"),  # what Sphinx calls typing.Annotated
    ("py:class", "torch.optim.optimizer.Optimizer"),  # torch deletes the module that its class says it is in
]
