"""A graded class -> ``summary.csv``, ``similar.csv``, ``summary.html`` and a page per student.

All names in them were chosen by students. The page escapes every text, holds no script and
allows none; a cell of a CSV that a spreadsheet would take for a formula begins with ``'``.
"""

from __future__ import annotations

import csv
import io
import statistics
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grader import markup, results, similarity
from grader import variant as variants
from grader.batch import GradedClass, Row
from grader.checks import Verdict
from grader.lab import Lab
from grader.progress import Progress
from grader.similarity import Similarity
from grader.submission import shown
from images.build import GUEST
from kernel.build import MODULE

TEMPLATE = "summary.html.j2"
BINS = 10
# In the page; similar.csv has all of them.
PAIRS_SHOWN = 100
_VERDICTS: tuple[Verdict, ...] = ("pass", "fail", "no-build", "panic", "hang", "infra")

PageWriter = Callable[[Mapping[str, object], Path], None]
"""What writes the page of one result, as result.schema.json has it."""


@dataclass(frozen=True)
class CheckRate:
    """How the class did in one check."""

    title: str
    rubric: str
    max_points: float
    mean: float
    """Points; of all who were graded, like the others."""
    full: float
    """Share of those who got every point."""
    steps: tuple[tuple[float, float], ...]
    """Of a check with steps: the points of each, and the share of those who reached it."""
    verdicts: str


@dataclass(frozen=True)
class Pair:
    """A `grader.similarity.Pair` with the students' names."""

    first: str
    second: str
    found: similarity.Pair


def write(
    graded: GradedClass, progress: Progress, write_page: PageWriter | None = None
) -> list[Path]:
    """Write everything into the class's folder; return the files for whoever runs this.

    Raises `UserError` if that cannot be written. A student's page that is not there, for want of
    `write_page` or for an error of its, is replaced by the result file.
    """
    with progress.phase("comparing"):
        alike = compare(graded)
    pages = _write_pages(graded, progress, write_page) if write_page else {}
    summary, similar, page = (
        graded.folder / name for name in ("summary.csv", "similar.csv", "summary.html")
    )
    results.write(summary, table(graded))
    results.write(similar, pairs_table(graded, alike))
    results.write(page, html(graded, alike, pages))
    return [summary, similar, page]


def compare(graded: GradedClass) -> Similarity:
    """Compare the distinct submissions with each other."""
    lab = graded.lab
    folders = (MODULE, GUEST)
    sources = {str(p): p for folder in folders for p in sorted(folder.rglob("*.[ch]"))}
    given = [_texts(sources), _texts(variants.starter(lab.folder).files)]
    submissions = {row.variant.key: row.variant for row in graded.rows if row.variant}
    return similarity.compare(
        given,
        _texts(variants.solution(lab.folder).files),
        {key: _texts(variant.files) for key, variant in submissions.items()},
    )


def _texts(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def _write_pages(graded: GradedClass, progress: Progress, write_page: PageWriter) -> dict[str, str]:
    """Write the students' own pages; return where the page of each `Row.name` is."""
    pages = {}
    results.make_folder(graded.folder / "pages")
    for row in graded.rows:
        if row.outcome.document is None or row.variant is None:
            continue
        # Those who share a result need not have handed in the same beside it.
        document = {**row.outcome.document, "ignored": list(row.variant.ignored)}
        page = Path("pages", f"{row.name}.html")
        try:
            write_page(document, graded.folder / page)
        except Exception as error:
            progress.say(f"no page for {row.student.name}: {shown(repr(error))}")
        else:
            pages[row.name] = str(page)
    return pages


def in_short(graded: GradedClass) -> str:
    """Return how many students there are of each kind, for example ``38 graded, 1 no grade``."""
    counts = Counter(row.outcome.status for row in graded.rows)
    return ", ".join(f"{count} {status}" for status, count in counts.most_common())


def note(row: Row, graded: GradedClass) -> str:
    """Return what there is to say about a row, in one line."""
    notes = [row.outcome.reason] if row.outcome.reason else []
    if row.outcome.status == "no grade" and row.outcome.key:
        notes.append(f"see logs/{row.outcome.key}.txt")
    if row.variant is not None:
        same = [
            other.student.name
            for other in graded.rows
            if other.variant is not None
            and other.variant.key == row.variant.key
            and other.submission is not row.submission
        ]
        notes += [f"the same files as {', '.join(same)}"] if same else []
        if row.variant.ignored:
            notes.append(f"ignored: {', '.join(row.variant.ignored)}")
    return "; ".join(" ".join(part.split()) for part in notes)


def result_file(row: Row) -> str:
    """Return where a row's result is, relative to the class's folder; empty if there is none."""
    return f"results/{row.outcome.key}.json" if row.outcome.document is not None else ""


def verdicts(checks: Iterable[Mapping[str, Any]]) -> str:
    """Return how often each verdict was given, for example ``6 pass, 4 fail``."""
    counts = Counter(check["verdict"] for check in checks)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS if counts[verdict])


# --------------------------------------------------------------------------------------- CSV


def table(graded: GradedClass) -> str:
    """Return the class as CSV, one line per student; without a grade there are no points."""
    lab = graded.lab
    heads = ["student", "id", "status", "score", "max"]
    heads += [f"rubric:{rubric}" for rubric in lab.rubrics]
    heads += [f"check:{check.id}" for check in lab.checks]
    rows: list[Sequence[str | float]] = [
        [*heads, "verdicts", "result", "key", "submission", "note"],
    ]
    for row in graded.rows:
        points: list[str | float] = [""] * (1 + len(lab.rubrics) + len(lab.checks))
        said = ""
        if (document := row.outcome.document) is not None:
            by_check = {check["id"]: check["points"] for check in document["checks"]}
            points = [document["score"], *_rubrics(lab, document).values()]
            points += [by_check[check.id] for check in lab.checks]
            said = verdicts(document["checks"])
        rows.append(
            [
                *(row.student.name, row.student.id, row.outcome.status),
                *(points[0], lab.max_score, *points[1:]),
                *(said, result_file(row), row.outcome.key, row.submission.place),
                note(row, graded),
            ]
        )
    return _csv(rows)


def pairs_table(graded: GradedClass, alike: Similarity) -> str:
    """Return the pairs of similar submissions as CSV, the most alike first."""
    heads = ["first", "second", "share", "common", "nowhere else", "first lines", "second lines"]
    rows: list[Sequence[str | float]] = [heads]
    for pair in _pairs(graded, alike):
        found = pair.found
        numbers = [round(found.share, 3), found.common, found.nowhere_else]
        rows.append([pair.first, pair.second, *numbers, found.first_lines, found.second_lines])
    return _csv(rows)


def _csv(rows: Iterable[Sequence[str | float]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [_harmless(cell) if isinstance(cell, str) else f"{cell:g}" for cell in row] for row in rows
    )
    return text.getvalue()


def _harmless(cell: str) -> str:
    """Return the cell so that no spreadsheet computes it (OWASP, "CSV Injection")."""
    # Wide forms of the signs are taken for the signs themselves.
    first = unicodedata.normalize("NFKC", cell.lstrip())[:1]
    return f"'{cell}" if first in ("=", "+", "-", "@") else cell


# -------------------------------------------------------------------------------------- HTML


def html(graded: GradedClass, alike: Similarity, pages: Mapping[str, str]) -> str:
    """Return the class as one page that needs nothing else; `pages` by `Row.name`."""
    lab = graded.lab
    documents = [row.outcome.document for row in graded.rows if row.outcome.document is not None]
    pairs = _pairs(graded, alike)
    return markup.template(TEMPLATE).render(
        lab=lab,
        letters=string.ascii_uppercase,
        median=statistics.median,
        rows=[
            {
                "student": row.student,
                "outcome": row.outcome,
                "rubrics": _rubrics(lab, row.outcome.document) if row.outcome.document else {},
                "page": pages.get(row.name) or result_file(row),
                "note": note(row, graded),
            }
            for row in graded.rows
        ],
        statuses=Counter(row.outcome.status for row in graded.rows),
        submissions=len({row.submission.place for row in graded.rows}),
        distinct=len({row.variant.key for row in graded.rows if row.variant}),
        scores=[document["score"] for document in documents],
        histogram=histogram([document["score"] for document in documents], lab.max_score),
        rates=check_rates(lab, documents),
        pairs=pairs[:PAIRS_SHOWN],
        pairs_left_out=max(0, len(pairs) - PAIRS_SHOWN),
        alike=alike,
        tokens=similarity.TOKENS,
        least_share=similarity.LEAST_SHARE,
        unrecognised=graded.unrecognised,
        environments=environments(documents),
    )


def _rubrics(lab: Lab, document: Mapping[str, Any]) -> dict[str, float]:
    return {
        rubric: sum(c["points"] for c in document["checks"] if c["rubric"] == rubric)
        for rubric in lab.rubrics
    }


def _pairs(graded: GradedClass, alike: Similarity) -> list[Pair]:
    """Return the pairs with names, those first that have handed in the very same files."""
    groups: dict[str, dict[str, str]] = {}
    for row in graded.rows:
        if row.variant is not None:
            names = ", ".join(student.name for student in row.submission.students)
            groups.setdefault(row.variant.key, {})[row.submission.place] = names
    same = []
    for key, places in groups.items():
        first, *others = places.values()
        # The starter, handed in as it was, tells nothing.
        if others and alike.own[key]:
            lines = "the same files"
            counts = alike.own[key], alike.unique[key]
            found = similarity.Pair(key, key, *counts, 1.0, lines, lines)
            same.append(Pair(first, "; ".join(others), found))
    everybody = {key: "; ".join(places.values()) for key, places in groups.items()}
    return [*same, *(Pair(everybody[p.first], everybody[p.second], p) for p in alike.pairs)]


def check_rates(lab: Lab, documents: Sequence[Mapping[str, Any]]) -> list[CheckRate]:
    """Return how the graded did in each check, in the lab's order; nothing if there are none."""

    def reached(points: float, results: Sequence[Mapping[str, Any]]) -> float:
        return len([result for result in results if result["points"] >= points]) / len(results)

    rates = []
    for check in lab.checks if documents else ():
        mine = [next(c for c in d["checks"] if c["id"] == check.id) for d in documents]
        rates.append(
            CheckRate(
                title=check.title,
                rubric=lab.rubrics[check.rubric],
                max_points=check.max_points,
                mean=sum(c["points"] for c in mine) / len(mine),
                full=reached(check.max_points, mine),
                steps=tuple((step.points, reached(step.points, mine)) for step in check.steps),
                verdicts=verdicts(mine),
            )
        )
    return rates


def environments(documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what machines graded, in words; where there is one, all had the same."""
    found = (document["environment"] for document in documents)
    return sorted(
        {
            f"Linux {e['kernel']}, QEMU {e['qemu']}, {e['cpu_model']}, {e['vcpus']} vCPUs, "
            f"commit {e['commit'] or 'unknown'}"
            for e in found
            # What does not compile was in no machine.
            if "qemu" in e
        }
    )


def histogram(scores: Sequence[float], max_score: float) -> str:
    """Return the distribution of points as SVG, the same for the same scores."""
    figure = Figure(figsize=(5.5, 2.0), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(scores, bins=BINS, range=(0, max_score), color="#4878a8", edgecolor="white")
    axes.set_xlabel("points")
    axes.set_ylabel("students")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return markup.svg(figure, "How many students have how many points", "points")
