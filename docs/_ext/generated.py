"""Sphinx extension: fill in the generated parts of the pages, and check the public names.

A page asks for a generated part with a fenced directive::

    ```{generated} commands
    What a code host shows instead.
    ```

The build warns, and so fails with `-W`, if a public name of `pruneforge` has no place in the reference or no
docstring, or if a docstring or an annotation refers to a name that does not exist.
"""

from __future__ import annotations

import pydoc
import re
import sys
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import pages
import pruneforge

logger = logging.getLogger(__name__)

MARKUP = re.compile(r"``[^`\n]+``|(?<![:\w])`([^`\n]+)`|\*")
"""Code in double or single backticks, or an asterisk."""


def check_api(app: Sphinx) -> None:
    """Warn of public names that the reference does not document."""
    for name in pruneforge.__all__:
        setattr(pruneforge, name, pages.public(name))  # so that autodoc does not find a module of the same name
    for problem in pages.api_problems():
        logger.warning(problem)


def expand_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Fill in the generated parts of a page."""
    source[0] = pages.expand(source[0])


def convert_backticks(app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Read docstrings as Markdown: single backticks are links to public classes or else code, asterisks are text."""
    for index, line in enumerate(lines):
        lines[index] = MARKUP.sub(_role, line)


def _role(match: re.Match[str]) -> str:
    if match[1] is None:
        return r"\*" if match[0] == "*" else match[0]
    name = match[1].removeprefix("pruneforge.")
    if name in pruneforge.__all__ and name[0].isupper():
        return f":py:obj:`~pruneforge.{name}`"
    return f"``{match[1]}``"


def shorten_defaults(
    app: Sphinx, what: str, name: str, item: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Write a dataclass's default factories so that Sphinx can parse the signature."""
    return signature and signature.replace("<factory>", "..."), returned


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | nodes.TextElement | None:
    """Link a name to where it is public; leave another name that exists as text.

    `None` leaves the reference broken, of which Sphinx warns.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    name = target.rpartition(".")[2]
    if name in pruneforge.__all__ and target in (name, _defined(name)):
        domain = env.get_domain("py")
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", f"pruneforge.{name}", node, content)
    return content if _exists(target) else None


def _defined(name: str) -> str:
    """Return where a public name is defined."""
    return f"{pages.public(name).__module__}.{name}"


def _exists(target: str) -> bool:
    if pydoc.locate(target) is not None:
        return True
    # A name in an annotation stands for an import of the module, which may be for type checkers alone.
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "pruneforge"]
    return any(_has(module, target) for module in modules)


def _has(item: Any, target: str) -> bool:
    for name in target.split("."):
        if not hasattr(item, name):
            return False
        item = getattr(item, name)
    return True


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the extension."""
    app.connect("builder-inited", check_api)
    app.connect("source-read", expand_page)
    app.connect("autodoc-process-docstring", convert_backticks, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten_defaults)
    app.connect("missing-reference", resolve)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
