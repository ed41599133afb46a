"""What the notebooks' cells call: a picture with its sentence, and words with numbers in them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from html import escape

from IPython.display import HTML, Markdown, display

from grader import markup
from notebooks.pictures import Picture


def show(picture: Picture) -> None:
    """Show a picture, and below it what a reader learns from it. Raises `Missing`."""
    learned = picture.learned()
    drawn = markup.svg(picture.draw(), learned, picture.name)
    drawn = drawn.replace("<svg ", '<svg style="max-width: 100%; height: auto" ', 1)
    display(HTML(f"<figure>{drawn}<figcaption><b>{escape(learned)}</b></figcaption></figure>"))


def say(text: str) -> None:
    """Show words, as Markdown."""
    display(Markdown(textwrap.dedent(text)))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Show a table."""
    lines = [heads, ["---"] * len(heads), *rows]
    display(Markdown("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)))


def _cell(value: object) -> str:
    # What others chose, a name say, is text and neither Markdown nor HTML.
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(str(value).split()))
