"""The verbs: pictures into a folder, notebooks executed into pages, and JupyterLab.

A run leaves nothing behind but its results: what Jupyter and IPython want to keep for themselves
goes into a folder that goes with the run.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import matplotlib as mpl
import nbformat
from jupyter_client.manager import AsyncKernelManager
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from grader import cache, limits, results
from grader.errors import UserError
from grader.lab import known_labs, load_lab
from grader.progress import Progress
from notebooks import material, published
from notebooks.material import Missing
from notebooks.pictures import Picture
from notebooks.pictures.cores import cores_pictures
from notebooks.pictures.grades import class_pictures, grade_pictures
from notebooks.pictures.labs import lab_pictures
from notebooks.pictures.latency import latency_pictures
from notebooks.pictures.paper import paper_pictures
from notebooks.pictures.sizes import sizes_pictures

FOLDER = Path(__file__).resolve().parent
KERNEL = "python3"
# What of JupyterLab asks the internet for news and newer versions, and the user whether it may.
NEWS = "@jupyterlab/apputils-extension:announcements"
PNG_DOTS_PER_INCH = 130
# For a whole notebook, on the reference machine.
SECONDS = 60.0
# A page that needs nothing else: without the scripts for formulas, diagrams and widgets, which
# the template fetches from elsewhere and no notebook here has. Links are the notebook's own.
_PAGE = """\
{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}<base href="{{ resources.folder }}/">{% endblock %}
"""
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class NotebookFailed(UserError):
    """A cell ends with an error, or a notebook takes too long."""


# ------------------------------------------------------------------------------------ pictures


def png(figure: Figure) -> bytes:
    """Return a picture as PNG, the same for the same figure."""
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=PNG_DOTS_PER_INCH, metadata={"Software": None})
    return written.getvalue()


def svg(figure: Figure, salt: str) -> bytes:
    """Return a picture as SVG that needs no font, the same for the same figure and salt."""
    written = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": salt}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


def plot(pictures: Iterable[Picture], out: Path, progress: Progress) -> list[Path]:
    """Write each picture into the folder `out`, as SVG and PNG; return the files.

    What the result at hand does not hold is named and left out. Raises `UserError` if a file cannot
    be written.
    """
    results.make_folder(out)
    written = []
    for picture in pictures:
        progress.update(picture.name)
        try:
            figure = picture.draw()
        except Missing as lacking:
            progress.say(f"not drawn, {picture.name}: {lacking.problem}")
            continue
        made: Mapping[str, bytes] = {"svg": svg(figure, picture.name), "png": png(figure)}
        for kind, content in made.items():
            path = out / f"{picture.name}.{kind}"
            results.write(path, content)
            written.append(path)
    return written


def all_pictures(
    bench: str = "",
    sharing: str = "",
    grades: Sequence[str] = (),
    exact: str = "",
    latency: str = "",
    sizes: str = "",
) -> list[Picture]:
    """Return the pictures of all notebooks, made of these result files.

    What is not named is the recorded one. Raises `UserError` for a file that is no result.
    """
    measured = material.bench(bench or material.BENCH, sharing)
    papers = published.read()
    found = paper_pictures(papers, measured)
    found |= cores_pictures(papers, material.cores(exact or material.EXACT))
    found |= sizes_pictures(papers, material.sizes(sizes or material.SIZES))
    found |= latency_pictures(material.latency(latency or material.LATENCY))
    for name in known_labs():
        found |= lab_pictures(name, measured)
    recorded = [str(material.recorded_grade(name, "starter")) for name in known_labs()]
    for path in grades or [path for path in recorded if Path(path).is_file()]:
        found |= grade_pictures(material.grade(path), measured.path)
    # A handout has no class.
    if material.CLASS.is_file():
        students = material.graded_class(material.CLASS)
        found |= class_pictures(students, load_lab(material.CLASS_LAB))
    return list(found.values())


# ----------------------------------------------------------------------------------- notebooks


def known() -> dict[str, Path]:
    """Return the notebooks of this checkout by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}


def chosen(names: Sequence[str]) -> list[Path]:
    """Return the notebooks of these names, without any: all. Raises `UserError`."""
    there = known()
    for name in names:
        if name not in there:
            raise UserError(f"there is no notebook {name}", f"choose from {', '.join(there)}")
    return [there[name] for name in names] if names else list(there.values())


def read(path: Path) -> NotebookNode:
    """Return a notebook. Raises `UserError` if the file is none."""
    try:
        found: NotebookNode = nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no notebook: {error}",
            "git checkout -- notebooks brings the project's own back",
        ) from None
    return found


def executed(path: Path) -> NotebookNode:
    """Run a notebook from top to bottom in the folder of the notebooks; return it with its outputs.

    Raises `NotebookFailed` with the cell that ends with an error, or runs when time is up.
    """
    notebook = read(path)
    limit = limits.scaled(SECONDS)
    end = time.monotonic() + limit
    number = 0
    with tempfile.TemporaryDirectory(prefix="notebook-") as scratch:
        # Sockets in a folder of ours: no port, and nobody else's kernel.
        kernel = AsyncKernelManager(
            kernel_name=KERNEL,
            connection_file=f"{scratch}/kernel.json",
            transport="ipc",
            ip=f"{scratch}/kernel",
        )
        client = NotebookClient(
            notebook,
            km=kernel,
            resources={"metadata": {"path": str(FOLDER)}},
            timeout_func=lambda _: max(1, round(end - time.monotonic())),
        )
        # The kernel is ours, so nobody else ends it.
        with client.setup_kernel(cleanup_kc=True, env={**os.environ, "IPYTHONDIR": scratch}):
            for index, cell in enumerate(notebook.cells):
                number += cell.cell_type == "code"
                where = f"{path.name}, cell {number} of those with code"
                try:
                    client.execute_cell(cell, index)
                except CellExecutionError as error:
                    raise _failed(where, error, path) from None
                except CellTimeoutError:
                    raise NotebookFailed(
                        f"{where}: it still runs, and the notebook had {limit:.0f} s",
                        f"open it and look: invoke lab --notebook {path.stem}",
                    ) from None
                except DeadKernelError:
                    raise NotebookFailed(
                        f"{where}: Python died there", "is the memory full? See invoke doctor"
                    ) from None
    return notebook


def _failed(where: str, error: CellExecutionError, path: Path) -> NotebookFailed:
    # Of a `UserError` the cell shows its report, see there.
    shown = _ESCAPES.sub("", error.traceback)
    _, told, todo = shown.partition("what to do: ")
    return NotebookFailed(
        f"{where}: {error.ename}: {_ESCAPES.sub('', error.evalue)}",
        todo.strip() if told else f"open it and look: invoke lab --notebook {path.stem}",
    )


def html(notebook: NotebookNode, page: Path) -> str:
    """Return an executed notebook as the text of `page`, without scripts from elsewhere."""
    exporter = HTMLExporter(raw_template=_PAGE)
    folder = os.path.relpath(FOLDER, page.resolve().parent)
    resources = {"metadata": {"name": page.stem}, "folder": folder}
    body, _ = exporter.from_notebook_node(notebook, resources)
    return str(body)


def notebooks(paths: Sequence[Path], out: Path, progress: Progress) -> list[Path]:
    """Execute notebooks and write a page of each into the folder `out`; return the pages.

    All of them are executed before the first page is written. Raises `UserError`.
    """
    results.make_folder(out)
    pages = {}
    for path in paths:
        with progress.phase(path.stem):
            page = out / f"{path.stem}.html"
            pages[page] = html(executed(path), page)
    for page, text in pages.items():
        results.write(page, text)
    return list(pages)


# ------------------------------------------------------------------------------------- the lab


def jupyter_lab(root: Path, notebook: Path) -> NoReturn:
    """Become JupyterLab with this notebook open, for this machine and whoever has the token.

    Jupyter makes the token and prints it. The user's own configuration does not count: it might
    open the server to others.
    """
    configuration = cache.root() / "jupyter"
    page = configuration / "labconfig" / "page_config.json"
    results.make_folder(page.parent)
    results.write(page, json.dumps({"disabledExtensions": {NEWS: True}}) + "\n")
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(configuration)}
    sys.stdout.flush()
    os.execve(sys.executable, lab_command(root, notebook), environment)


def lab_command(root: Path, notebook: Path) -> list[str]:
    """Return the command that serves the checkout's folder to this machine alone."""
    command = [
        *(sys.executable, "-m", "jupyterlab"),
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.allow_remote_access=False",
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url=/lab/tree/{notebook.relative_to(root)}",
        # Ctrl-C ends it, and does not ask first.
        "--ServerApp.answer_yes=True",
        # It asks nobody for extensions, and looks for no other programs.
        "--LabApp.extension_manager=readonly",
        "--LanguageServerManager.autodetect=False",
    ]
    return [*command, "--allow-root"] if os.geteuid() == 0 else command
