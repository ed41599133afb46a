"""The notebooks: they run from top to bottom, and hold nothing but what was written."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import psutil
import pytest

from grader import setup
from grader.errors import UserError
from grader.lab import known_labs
from grader.progress import Progress
from notebooks import run

NOTEBOOKS = run.known()


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_it_runs_on_what_was_recorded(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    (page,) = run.notebooks([path], tmp_path / "out", Progress(quiet=True))
    text = page.read_text()
    assert "<svg " in text
    assert "Traceback" not in text
    # Nothing is fetched from elsewhere.
    assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?!data:)', text) == []
    assert [file.name for file in (tmp_path / "out").iterdir()] == [page.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_it_is_committed_without_outputs(path: Path) -> None:
    notebook = run.read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    for cell in code:
        clean = cell.outputs == [] and cell.execution_count is None
        assert clean, "in JupyterLab: Edit, Clear Outputs of All Cells, and save"
    # The one variable to change.
    assert any(re.search(r"^RESULT = ", cell.source, re.M) for cell in code)


def test_each_lab_has_one() -> None:
    assert set(known_labs()) <= set(NOTEBOOKS)


def test_links_lead_somewhere() -> None:
    for path in NOTEBOOKS.values():
        for cell in run.read(path).cells:
            for link in re.findall(r"\]\(([^)#:]+)", cell.source):
                assert (path.parent / link).exists(), f"{path.name} links to {link}"


def _notebook(path: Path, *cells: str) -> Path:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    path.write_text(nbformat.writes(made))
    return path


def _first_cell(name: str, result: str) -> str:
    cell = next(c for c in run.read(NOTEBOOKS[name]).cells if c.cell_type == "code")
    return re.sub(r"^RESULT = .*$", f"RESULT = {result!r}", cell.source, flags=re.M)


def test_a_file_that_is_no_result_is_told_without_a_traceback(tmp_path: Path) -> None:
    bad = tmp_path / "mine.json"
    bad.write_text('{"version": 1}')
    path = _notebook(tmp_path / "lab.ipynb", "1 + 1", _first_cell("paper", str(bad)))
    with pytest.raises(UserError) as caught:
        run.notebooks([path], tmp_path / "out", Progress(quiet=True))
    assert "lab.ipynb, cell 2 of those with code: BadResult" in caught.value.problem
    assert f"{bad} is no result of a bench" in caught.value.problem
    assert caught.value.todo == "name another file"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_cell_that_fails_or_never_ends_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _notebook(tmp_path / "a.ipynb", "1 / 0")
    with pytest.raises(run.NotebookFailed, match=r"a\.ipynb, cell 1 .*: ZeroDivisionError") as one:
        run.executed(path)
    assert "invoke lab --notebook a" in one.value.todo
    monkeypatch.setattr(run, "SECONDS", 0.1)
    path = _notebook(tmp_path / "b.ipynb", "while True: pass")
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(run.NotebookFailed, match=r"b\.ipynb, cell 1 .*: it still runs"):
        run.executed(path)
    assert set(psutil.Process().children(recursive=True)) <= before


def test_an_unknown_notebook_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="no notebook papre") as caught:
        run.chosen(["papre"])
    assert "paper" in caught.value.todo
    assert run.chosen(["paper"]) == [NOTEBOOKS["paper"]]


def test_the_lab_is_served_to_this_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "execve", lambda _, command, env: became.append((command, env)))
    run.jupyter_lab(setup.ROOT, NOTEBOOKS["2-partitioning"])
    ((command, environment),) = became
    assert "--ServerApp.ip=127.0.0.1" in command
    assert "--LabApp.default_url=/lab/tree/notebooks/2-partitioning.ipynb" in command
    # Jupyter makes a token unless somebody has said otherwise, and nobody but us says anything.
    assert not any("token" in word or "password" in word for word in command)
    configuration = Path(environment["JUPYTER_CONFIG_DIR"])
    files = [str(p.relative_to(configuration)) for p in configuration.rglob("*") if p.is_file()]
    assert files == ["labconfig/page_config.json"]
