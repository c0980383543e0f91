"""Sphinx's settings of the site; ``build.py`` says what its pages are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fairline

asked = os.environ.get("FAIRLINE_SITE", "")  # build.py's options
project = "fairline"
author = "fairline contributors"
version = release = fairline.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    *([] if "check" in asked else ["sphinx.ext.viewcode"]),
    "sphinx_design",
    "myst_nb",
    "mathml",
    "reference",
]
root_doc = "index"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_fence_as_directive = ["math"]  # GitHub's own way to write a formula
myst_heading_anchors = 4
nb_execution_mode = "off" if asked else "force"
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
toc_object_entries_show_parents = "hide"
# Of other packages there is no index without a network; of fairline's own names each must exist (reference.py).
nitpick_ignore_regex = [(r"py:.*", r"(?!fairline\b).*\..*"), (r"py:.*", r"(?:nn|pd|np)\..*")]
highlight_language = "text"

html_theme = "pydata_sphinx_theme"
html_title = "fairline"
html_static_path = ["static"]
html_css_files = ["fairline.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "search_bar_text": "Search",
    "navigation_depth": 2,
    "footer_start": [],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "github-dark",
}
html_sidebars = {"index": []}
