r"""Reads the reStructuredText roles of the docstrings as Markdown, for mkdocstrings.

``:math:`` roles and ``.. math::`` blocks become arithmatex formulas, the other roles
plain code.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

_DISPLAY = re.compile(
    r"^(?P<indent> *)\.\. math:: ?(?P<first>.*)\n(?P<rest>(?:(?P=indent) +.*\n|\n)*)",
    re.MULTILINE,
)
_MATH = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:class|meth|func|data|attr|mod|exc):`[~.]?([^`]+)`")


def to_markdown(text: str) -> str:
    r"""Convert the roles of one docstring.

    Returns:
        The docstring in Markdown.

    Example:
        >>> to_markdown(":class:`trak.TRAKer` solves :math:`x^2`")
        '`trak.TRAKer` solves \\(x^2\\)'
    """
    text = _DISPLAY.sub(_display, text + "\n")
    text = _MATH.sub(lambda m: rf"\({m[1]}\)", text)
    return _ROLE.sub(lambda m: f"`{m[1]}`", text).rstrip("\n")


def _display(match: re.Match[str]) -> str:
    body = textwrap.dedent(match["first"] + "\n" + textwrap.dedent(match["rest"]))
    block = f"\\[\n{body.strip()}\n\\]\n\n"
    return textwrap.indent(block, match["indent"])


class Roles(Extension):
    """Applies :func:`to_markdown` to every docstring that is collected."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Convert the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
