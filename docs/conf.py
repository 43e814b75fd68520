"""The documentation's build: ``make docs``.

Pages come from this folder, the notebooks as they are committed, and the reference from the docstrings.
The site loads nothing from any network: no fonts, no scripts; formulas are MathML, made here.
"""

import contextlib
import io
import re
import shutil
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

import kvpitfalls
from kvpitfalls import cli

project, author, copyright = "kvpitfalls", "the kvpitfalls authors", "the kvpitfalls authors"
version = release = kvpitfalls.__version__
extensions = ["myst_nb", "numpydoc", "sphinx.ext.autodoc"]
exclude_patterns = ["conf.py", "check_site.py"]
html_theme = "furo"
html_title = f"kvpitfalls {release}"
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_math_renderer = "mathml"
html_static_path, html_css_files = ["_static"], ["site.css"]
nitpicky = True

HERE = Path(__file__).parent
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks")
nb_execution_mode = "off"  # tests/test_notebooks.py executes them
nb_ipywidgets_js = {}
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more
autodoc_default_options = {"members": True}


def _inline(translator, node):
    translator.body.append(convert(node.astext()))
    raise SkipNode


def _block(translator, node):
    translator.body.append(
        f"<div class='math' style='overflow-x: auto; padding: .4em 0'>{convert(node.astext(), display='block')}</div>"
    )
    raise SkipNode


def setup(app):
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("source-read", _with_own_notebooks)
    app.connect("source-read", _with_help)
    app.connect("source-read", _with_readme)


def _with_own_notebooks(app, name, source):
    """Links between notebooks and this folder are those of the repository, where they lie side by side; the site has a
    copy inside it."""
    source[0] = source[0].replace("](../notebooks/", "](notebooks/").replace("](../docs/", "](../")


def _with_help(app, name, source):
    """``<!-- help COMMAND -->`` stands for what the command prints."""
    source[0] = re.sub(r"<!-- help ?([\w-]*) -->", lambda found: f"```text\n{_help(found[1])}```", source[0])


def _with_readme(app, name, source):
    """``<!-- readme TITLE -->`` stands for that part of the README, whose links to what is no page of the site are
    plain text."""
    source[0] = re.sub(r"<!-- readme (.+?) -->", lambda found: _part_of_readme(found[1]), source[0])


def _part_of_readme(title: str) -> str:
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    part = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## )", text, flags=re.M | re.S)[1]
    return re.sub(r"\[([^]]*)\]\((?!https?:|docs/)[^)]*\)", r"\1", part).replace("](docs/", "](")


def _help(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    return said.getvalue()
