"""Sphinx: `make docs` builds the site from these pages and the docstrings, with every warning an error."""

from pathlib import Path
import re
import shutil
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import optax_mtl

HERE = Path(__file__).parent
NAMES = frozenset(optax_mtl.__all__)

# Sphinx reads what is in its own folder. The copies are ignored by git.
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)

project = "optax_mtl"
author = "The optax_mtl Authors"
project_copyright = author
version = release = optax_mtl.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # formulas are drawn without a network
]
exclude_patterns = ["_build", "evidence/runs", "evidence/verdicts.md"]  # the last is part of other pages

# -- Pages ---------------------------------------------------------------------

nb_execution_mode = "off"  # tests run the notebooks; here they are shown with the outputs that are stored in them
myst_enable_extensions = ["dollarmath"]
highlight_language = "none"  # unless a block says what it is in
myst_heading_anchors = 3
myst_links_external_new_tab = False

linkcheck_anchors = False  # forges make theirs with scripts
linkcheck_timeout = 20

# -- Docstrings ----------------------------------------------------------------

default_role = "literal"  # `x` is code, as in a terminal and in Markdown
autodoc_typehints = "none"  # docstrings tell shapes and types; in signatures they hide the arguments
autosummary_generate = False  # a page a name would be 150 pages of one paragraph
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
toc_object_entries_show_parents = "hide"
nitpick_ignore_regex = [("py:.*", r"(?!optax_mtl\b).*")]  # others' names could be checked with a network only


def name_of(code: str) -> str | None:
    """The public name that a piece of code is, or calls, if it is nothing else."""
    match = re.fullmatch(r"(?:(?:mtl|optax_mtl)\.)?(\w+)(?:\(.*\))?", code, flags=re.DOTALL)
    return match[1] if match and match[1] in NAMES else None


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Makes `mgda`, or `mgda(num_tasks=2)`, in a page or a docstring, a link to where mgda is described."""
    for code in list(doctree.findall(nodes.literal)):
        name = name_of(code.astext())
        if name is None or isinstance(code.parent, (nodes.reference, nodes.title, addnodes.pending_xref)):
            continue
        link = addnodes.pending_xref(
            "",
            refdoc=app.env.docname,
            refdomain="py",
            reftype="obj",
            reftarget=f"optax_mtl.{name}",
            refexplicit=True,
            refwarn=True,
        )
        code.parent.replace(code, link)
        link += code


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("doctree-read", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# -- Looks ---------------------------------------------------------------------

html_theme = "furo"
html_title = f"optax_mtl {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
