"""Sphinx configuration: `make docs` builds the site from the repository's Markdown and notebooks.

The source folder is the root of the repository, so that links between files mean the same on the
site and on a code host. Notebooks are shown with their committed outputs; nothing is executed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "Pellucid"
extensions = ["myst_nb", "api_pages", "mathml", "repository_links"]

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "notebooks/*.ipynb", "diffusion/weights/*/README.md"]
exclude_patterns = ["build", "data", "tests", "**/.*", ".*"]
api_packages = ["bpe", "transformer", "audio", "diffusion", "training"]

nb_execution_mode = "off"
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "fieldlist"]
smartquotes = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72

nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other projects and builtins have no page here

highlight_language = "none"  # of blocks that name no language
html_theme = "furo"
html_title = "Pellucid"
html_favicon = "../serve/web/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}  # the first page is docs/index.html
