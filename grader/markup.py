"""What the pages have in common: templates that escape by themselves, and plots inside them."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure


def template(name: str) -> jinja2.Template:
    """Return a template of this folder; what it is given is escaped, what it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def svg(figure: Figure, description: str, salt: str) -> str:
    """Return a plot for a page, the same for the same figure.

    `description` is for those who do not see it. Identifiers differ between plots by `salt`.
    """
    written = io.StringIO()
    # Text stays text.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    # Inside a page it needs neither XML's prolog nor a document type.
    text = text[text.index("<svg") :]
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
