"""The project's verbs.

``python3 tasks.py VERB`` works on a bare machine: it makes ``.venv``, installs what is missing
and carries on. After that ``.venv/bin/invoke VERB`` does the same without looking.
"""

# Only the verb that runs pays for its imports, and a broken part leaves the others usable.
# ruff: noqa: PLC0415

import sys

if __name__ == "__main__":
    # Old versions get this far only because this file has no newer syntax, and no __future__.
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(
            "error: this is Python {}.{}; the project needs 3.11 or newer\n"
            "what to do: run it as   python3.11 tasks.py   (or a newer one; Debian 12 and 13 "
            "have it as python3)".format(*sys.version_info)
        )
    from grader import setup

    sys.exit(setup.main(sys.argv[1:]))

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import Task, task

from grader import setup
from grader.errors import UsageError, UserError

if TYPE_CHECKING:
    from grader.grade import Grade
    from grader.lab import Lab
    from grader.variant import Variant

LAB = setup.usual_lab(setup.ROOT)
REPORT_HELP = "FORMAT=PATH, again and again: junit, gradescope, prairielearn, autolab, html"
EXPLAIN_HELP = "print what each check's points follow from, and why its steps are where they are"
# Exit status of grade when this machine, not the submission, kept checks from being judged.
NO_GRADE = 3

setup.add_system_folders()
if not setup.is_current(setup.ROOT):
    setup.say("note: .venv is out of date; run   python3 tasks.py VERB   once")


def verb(
    *, instructors: bool = False, **options: Any
) -> Callable[[Callable[..., int | None]], Callable[..., Any]]:
    """Make a function a task: its result is the exit status, a `UserError` no traceback.

    One for `instructors` is no task in a handout, which does not have what it needs.
    """

    def wrap(function: Callable[..., int | None]) -> Callable[..., Any]:
        if instructors and setup.is_handout(setup.ROOT):
            return function

        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> None:
            try:
                status = function(*arguments, **named)
            except UserError as error:
                raise Exit(error.report(), code=error.status) from None
            except KeyboardInterrupt:
                raise Exit("\ninterrupted", code=130) from None
            if status:
                raise Exit(code=status)

        made: Task[Any] = task(auto_shortflags=False, **options)(run)
        return made

    return wrap


@verb()
def doctor(_: Context) -> int:
    """Say what is present, missing or broken here."""
    from grader import doctor as module

    return module.run()


@verb(
    help={
        "debug": "the kernel with KASAN, lockdep and the other checkers",
        "module-only": "not the guest's programs",
        "lab": "whose files to build them with",
    }
)
def build(_: Context, debug: bool = False, module_only: bool = False, lab: str = LAB) -> None:
    """Build kernel, module and guest programs."""
    from grader import given, interactive, station
    from grader.lab import LABS, load_lab
    from grader.progress import Progress
    from kernel.build import build_kernel, build_module, source_key

    chosen = load_lab(lab)
    variant = interactive.choose_variant(chosen)
    given.check_source(LABS, source_key())
    progress = Progress()
    with progress.phase("build"):
        kernel = build_kernel(debug, progress)
        progress.say(str(kernel.vmlinux))
        if module_only:
            module = build_module(kernel, station.kernel_files(chosen, variant))
            progress.say(f"{module.ko}")
        else:
            built = station.build(chosen, variant, kernel)
            module = built.module
            progress.say(f"{module.ko}\n{built.image.initramfs}")
        commands = interactive.write_compile_commands(setup.ROOT, chosen, variant, module)
        progress.say(str(commands))


@verb(
    help={
        "smp": "number of virtual CPUs",
        "variant": "whose lab files: mine (those in labs/), starter or solution",
        "gdb": "wait for gdb before the servers start",
        "debug": "the kernel with the checkers",
        "kvm": "use KVM (faster; never used for a grade)",
        "lab": "which lab",
    }
)
def boot(
    _: Context,
    smp: int = 4,
    variant: str = "",
    gdb: bool = False,
    debug: bool = False,
    kvm: bool = False,
    lab: str = LAB,
) -> None:
    """Boot the machine with its console here."""
    from grader import interactive
    from grader.lab import load_lab

    interactive.boot(load_lab(lab), variant, smp=smp, gdb=gdb, debug=debug, kvm=kvm)


@verb(
    help={
        "port": "5000: MegaPipe, 5001: epoll",
        "connections": "how many at once",
        "per-connection": "transactions before a connection closes (0: it stays open)",
        "size": "bytes in a message",
        "transactions": "how many in all",
    }
)
def load(
    _: Context,
    port: int = 5000,
    connections: int = 64,
    per_connection: int = 1,
    size: int = 64,
    transactions: int = 10_000,
) -> int:
    """Send traffic to the machine that boot runs."""
    from grader import interactive
    from grader.load import LoadSpec
    from grader.network import GUEST_ADDRESS

    spec = LoadSpec(
        GUEST_ADDRESS,
        port,
        connections=connections,
        transactions_per_connection=per_connection,
        size=size,
    )
    return interactive.load(spec, transactions)


@verb(
    iterable=["report"],
    help={
        "submission": "folder, .zip or .tar.gz with the lab's files (default: the lab's own)",
        "variant": "grade mine (the files in labs/), starter or solution",
        "json": "write the result here as well",
        "report": REPORT_HELP,
        "explain": EXPLAIN_HELP,
        "lab": "which lab",
        "check": "only these checks, a list of their ids",
        "seed": "of the load's payload, to repeat a run (default: another one each time)",
        "watch": "grade again whenever a file is saved, and say what has changed, until Ctrl-C",
        "exact": "only what transactions cost, in virtual time: the same numbers each time",
    },
)
def grade(
    _: Context,
    submission: str = "",
    variant: str = "",
    json: str = "",
    report: Sequence[str] | None = None,
    explain: bool = False,
    lab: str = LAB,
    check: str = "",
    seed: int = -1,
    watch: bool = False,
    exact: bool = False,
) -> int:
    """Grade; status 0 means graded, whatever the score."""
    from grader import exact_grade, formats, given, interactive, results
    from grader import grade as grading
    from grader import report as reporting
    from grader import variant as variants
    from grader import watch as watching
    from grader.lab import LABS, load_lab
    from grader.progress import Progress
    from kernel.build import source_key

    if submission and variant:
        raise UsageError("--submission and --variant exclude each other", "leave one of them out")
    chosen = load_lab(lab)
    if check:
        chosen = chosen.only(check.split(","))
    if exact:
        chosen = exact_grade.possible(chosen)
    if json:
        results.check_writable(Path(json), "--json")
    reports = formats.chosen(report or ())

    def read() -> "Variant":
        if submission:
            return variants.submission(chosen.folder, Path(submission))
        return interactive.choose_variant(chosen, variant)

    given.check_source(LABS, source_key())

    def once() -> "Grade":
        what, progress = read(), Progress()
        chance = None if seed < 0 else seed
        graded = grading.grade(chosen, what, seed=chance, progress=progress, exact=exact)
        _tell(graded, chosen, json, reports, explain)
        progress.say(f"time: {progress.summary()}")
        again = f"invoke grade --lab {lab} --seed {graded.environment['seed']}"
        again += f" --check {check}" if check else ""
        again += " --exact" if exact else ""
        again += f" --submission {submission}" if submission else f" --variant {what.name}"
        if folder := reporting.write_bundle(graded, again, setup.ROOT / "results"):
            progress.say(f"why: {folder} holds consoles, counters, and the command to run it again")
        return graded

    if watch:
        paths = watching.watched(chosen, Path(submission) if submission else None)
        watching.grade_on_save(paths, once, Progress().say)
        return 0
    return 0 if once().judged else NO_GRADE


@verb(
    positional=["result"],
    iterable=["report"],
    help={
        "result": "a file that grade --json has written",
        "check": "only these checks, a list of their ids",
        "json": "write the new result here",
        "report": REPORT_HELP,
        "explain": EXPLAIN_HELP,
    },
)
def regrade(
    _: Context,
    result: str,
    check: str = "",
    json: str = "",
    report: Sequence[str] | None = None,
    explain: bool = False,
) -> int:
    """Compute a result's points anew, by today's lab.toml."""
    from grader import formats, results
    from grader import regrade as regrading
    from grader import report as reporting
    from grader.lab import load_lab

    if json:
        results.check_writable(Path(json), "--json")
    reports = formats.chosen(report or ())
    document = reporting.read(Path(result))
    lab = load_lab(document["lab"])
    if check:
        lab = lab.only(check.split(","))
    graded = regrading.regrade(document, lab)
    _tell(graded, lab, json, reports, explain)
    for change in regrading.changes(document, graded) or ["nothing has changed"]:
        print(change)
    return 0 if graded.judged else NO_GRADE


def _tell(
    graded: "Grade", lab: "Lab", json: str, reports: Sequence[tuple[str, Path]], explain: bool
) -> None:
    from rich.console import Console

    from grader import explain as explaining
    from grader import formats
    from grader import report as reporting

    if json:
        reporting.write_json(graded, Path(json))
    if reports or explain:
        document = reporting.as_json(graded)
        formats.write(document, reports)
        if explain:
            print(explaining.text(document))
    reporting.table(graded, lab, Console())


@verb(
    instructors=True,
    positional=["folder"],
    help={
        "folder": "of submissions: folders or archives, or an export of Gradescope or Moodle",
        "lab": "which lab",
        "out": "folder for the results (default: results/LAB-FOLDER); what is there already is "
        "not graded again",
        "jobs": "how many grades at a time (default: one for two cores and 3 GiB of free memory; "
        "more disturb each other's counts)",
    },
)
def grade_all(_: Context, folder: str, lab: str = LAB, out: str = "", jobs: int = -1) -> int:
    """Grade a class; status 0 means that everybody has a grade."""
    from grader import batch, page, summary
    from grader.lab import load_lab
    from grader.progress import Progress

    chosen = load_lab(lab)
    source = Path(folder)
    target = Path(out) if out else setup.ROOT / "results" / f"{lab}-{source.resolve().name}"
    progress = Progress()
    grader = batch.InvokeGrade(chosen)
    jobs = batch.default_jobs() if jobs < 0 else jobs
    graded = batch.run(chosen, source, target.resolve(), grader, jobs, progress)
    for path in summary.write(graded, progress, page.write):
        progress.say(str(path))
    progress.say(f"students: {summary.in_short(graded)}")
    return 0 if graded.judged else NO_GRADE


@verb(
    instructors=True,
    help={
        "lab": "which lab (default: all)",
        "only": "variants whose names match this regular expression",
        "list_": "say what there is, grade nothing",
        "cheats": "submissions that want points without the work instead: see labs/cheats",
    },
)
def prove(
    _: Context, lab: str = "", only: str = "", list_: bool = False, cheats: bool = False
) -> int:
    """Grade solution, starter and every mutant of the labs: each must lose its own checks."""
    from rich.console import Console

    from grader import cheats as cheating
    from grader import prove as proving
    from grader.lab import known_labs, load_lab
    from grader.progress import Progress

    labs = [load_lab(name) for name in ([lab] if lab else known_labs())]
    if cheats:
        chosen = cheating.matching(lab, only)
        if list_:
            for cheat in chosen:
                print(f"{cheat.lab} {cheat.id}: {cheat.tries}")
            return 0
        became = cheating.run(Progress(), [cheat.id for cheat in chosen])
        Console().print(cheating.table(became))
        return 0 if all(row.as_stated for row in became) else 1
    if list_:
        for one in labs:
            for mutant in proving.mutants(one):
                race = " (race)" if mutant.race else ""
                print(f"{one.name} {mutant.name}{race}: {mutant.what}")
        return 0
    rows = proving.prove(labs, only, progress=Progress())
    proving.report(rows, Console())
    return 0 if all(row.holds for row in rows) else 1


@verb(
    instructors=True,
    help={"accept": "what is measured now is right, and what later runs are compared with"},
)
def golden(_: Context, accept: bool = False) -> int:
    """Measure what each function costs, to the instruction: status 1 if one has become dearer."""
    from grader import golden as module
    from grader.lab import load_lab
    from grader.progress import Progress
    from grader.station import build_solution

    progress = Progress()
    dearer = module.run(build_solution(load_lab(LAB), progress), progress, accept)
    if accept:
        print(f"accepted: {module.ACCEPTED.relative_to(setup.ROOT)}")
    for one in dearer:
        print(f"dearer  {one}")
    if dearer:
        print("If that is meant to be: invoke golden --accept, and say why in the commit.")
    elif not accept:
        print("No function has become dearer.")
    return 1 if dearer else 0


@verb(
    help={
        "servers": "all, or a list: epoll, epoll-exclusive, epoll-reuseport, io_uring, limit, "
        "plain, and MegaPipe with any of B, P, L",
        "per-connection": "transactions per connection, a list such as 1,10,128 (0: it stays open)",
        "sizes": "bytes of a message, a list such as 64,1024,16384",
        "smp": "numbers of virtual CPUs, a list such as 1,2,4,8",
        "rounds": "how often each server is measured, in turn",
        "until": "add rounds, up to four times as many, until each ratio is within so many %",
        "quick": "a bench of five minutes (the other options still count)",
        "full": "all of it: hours; says how many first",
        "out": "the result file (results/bench.json); an interrupted bench goes on where it was",
        "fresh": "discard what an interrupted bench has left",
        "show": "measure nothing, show the tables of this result file",
        "counts": "show everything that is counted as well",
        "model": "show the cost model, and what each optimisation contributes, as well",
        "transfers": "for the model: a result of --sharing (sharing.json beside --show's, if any)",
        "sharing": "count the cache lines that move between CPUs instead (the first of "
        "--per-connection and of --smp; --out: results/sharing.json); with --exact: as well",
        "exact": "in virtual time, with the clients in the machine: the same numbers each time, "
        "whatever the host does (--out: results/exact.json)",
        "turn": "of --exact: how long a CPU runs before the next, in ticks of 838 ns (12; 0: until "
        "a timer is due, which is faster)",
        "jobs": "of --exact: machines at a time (default: one for each CPU of the host)",
        "lab": "whose solution MegaPipe is",
    }
)
def bench(
    _: Context,
    servers: str = "",
    per_connection: str = "",
    sizes: str = "",
    smp: str = "",
    rounds: int = 0,
    until: float = 0.0,
    quick: bool = False,
    full: bool = False,
    out: str = "",
    fresh: bool = False,
    show: str = "",
    counts: bool = False,
    model: bool = False,
    transfers: str = "",
    sharing: bool = False,
    exact: bool = False,
    turn: int = -1,
    jobs: int = 0,
    lab: str = LAB,
) -> None:
    """Measure MegaPipe, epoll, io_uring and the limit side by side."""
    from dataclasses import replace

    from grader import bench as module
    from grader import results, samples
    from grader.lab import load_lab

    if (model or counts) and not show:
        raise UsageError(
            "--model and --counts show what --show names",
            f"--show results/bench.json --{'model' if model else 'counts'}",
        )
    if show:
        document, found = samples.read(Path(show))
        if "exact" in document["identity"]:
            from grader import contributions, scaling
            from grader import exact as virtual

            console = module.wide_console()
            virtual.report(found, console, counts=counts)
            if model:
                contributions.report(found, virtual.transfers(found), console, least=1)
                scaling.report(found, console)
            return
        module.report(found, module.wide_console(), counts=counts)
        if model:
            from grader import contributions
            from grader.sharing import read_transfers

            beside = Path(transfers or Path(show).with_name("sharing.json"))
            there = bool(transfers) or beside.is_file()
            moved = read_transfers(beside, document["identity"]) if there else {}
            contributions.report(found, moved, module.wide_console())
        return
    if quick and full:
        raise UsageError("--quick and --full exclude each other", "leave one of them out")
    if not exact and (turn >= 0 or jobs):
        raise UsageError("--turn and --jobs belong to --exact", "add it, or leave them out")
    if exact and (rounds or until):
        raise UsageError("--exact: one round says all", "leave out --rounds and --until")
    grids = module.EXACT if exact else module.WIRE
    grid = grids["quick" if quick else "full" if full else "usual"]
    given: dict[str, Any] = {
        "servers": module.choose(servers) if servers else (),
        "per_connection": _numbers("per-connection", per_connection),
        "sizes": _numbers("sizes", sizes),
        "vcpus": _numbers("smp", smp),
        "rounds": rounds,
        "until": until,
    }
    grid = replace(grid, **{name: value for name, value in given.items() if value})
    name = "exact" if exact else "sharing" if sharing else "bench"
    path = Path(out or setup.ROOT / "results" / f"{name}.json")
    if not out:
        results.make_folder(path.parent)
    results.check_writable(path, "--out")
    if exact:
        from grader import exact as virtual

        setting = virtual.Setting(turn if turn >= 0 else virtual.TURN, sharing)
        virtual.run(load_lab(lab), grid, setting, path, fresh=fresh, jobs=jobs)
    elif sharing:
        from grader import sharing as moving

        moving.run(load_lab(lab), grid, path)
    else:
        module.run(load_lab(lab), grid, path, fresh=fresh)


@verb(
    help={
        "thresholds": "how many requests gather before they go down, a list (1 to 256)",
        "connections": "how many connections are open, a list (1,8,64,256)",
        "out": "the result file (results/latency.json)",
        "lab": "whose solution MegaPipe is",
    }
)
def latency(
    _: Context, thresholds: str = "", connections: str = "", out: str = "", lab: str = LAB
) -> None:
    """Measure how long replies take under batching, in virtual time: the same each time."""
    from grader import latency as module
    from grader import results
    from grader.lab import load_lab

    path = Path(out or setup.ROOT / "results" / "latency.json")
    if not out:
        results.make_folder(path.parent)
    results.check_writable(path, "--out")
    module.run(
        load_lab(lab),
        module.numbers("--thresholds", _numbers("thresholds", thresholds), module.THRESHOLDS),
        module.numbers("--connections", _numbers("connections", connections), module.CONNECTIONS),
        path,
    )


@verb(
    help={
        "servers": "a list; the first is what the others are compared with",
        "per-connection": "transactions per connection, a list such as 1,128",
        "rounds": "how often each server is measured, in turn",
        "smp": "number of virtual CPUs",
        "size": "bytes of a message",
        "out": "folder for tables and flame graphs (default: results/profile)",
        "lab": "whose solution MegaPipe is",
    }
)
def profile(
    _: Context,
    servers: str = "limit,epoll,BPL",
    per_connection: str = "1",
    rounds: int = 3,
    smp: int = 4,
    size: int = 64,
    out: str = "",
    lab: str = LAB,
) -> None:
    """Show where the instructions go: by layer, and as flame graphs."""
    from grader import bench as module
    from grader import profile as profiling
    from grader.lab import load_lab

    profiling.run(
        load_lab(lab),
        module.choose(servers),
        _numbers("per-connection", per_connection),
        rounds,
        Path(out) if out else setup.ROOT / "results" / "profile",
        smp,
        size,
    )


@verb(
    iterable=["grade"],
    help={
        "out": "folder for the pictures (default: results/plots)",
        "bench": "a bench's result (default: the recorded one)",
        "sharing": "a result of bench --sharing (default: sharing.json beside the bench's, if any)",
        "grade": "a result of grade --json, again and again (default: the recorded ones)",
        "exact": "a result of bench --exact --sharing (default: the recorded one)",
        "latency": "a result of latency (default: the recorded one)",
        "sizes": "a result of bench --exact over several --sizes (default: the recorded one)",
    },
)
def plot(
    _: Context,
    out: str = "",
    bench: str = "",
    sharing: str = "",
    grade: Sequence[str] | None = None,
    exact: str = "",
    latency: str = "",
    sizes: str = "",
) -> None:
    """Write the notebooks' pictures as SVG and PNG."""
    from grader.progress import Progress
    from notebooks import run as running

    progress = Progress()
    folder = Path(out) if out else setup.ROOT / "results" / "plots"
    with progress.phase("pictures"):
        pictures = running.all_pictures(bench, sharing, grade or (), exact, latency, sizes)
        written = running.plot(pictures, folder, progress)
    progress.say(f"{folder}: {len(written)} files")


@verb(
    help={
        "only": "a list of notebooks, such as paper,1-batching (default: all)",
        "out": "folder for the pages (default: results/notebooks)",
    },
)
def notebooks(_: Context, only: str = "", out: str = "") -> None:
    """Execute the notebooks and write them as HTML."""
    from grader.progress import Progress
    from notebooks import run as running

    progress = Progress()
    folder = Path(out) if out else setup.ROOT / "results" / "notebooks"
    for page in running.notebooks(running.chosen(_words(only)), folder, progress):
        progress.say(str(page))
    progress.say(f"time: {progress.summary()}")


@verb(
    help={
        "lab": "whose notebook to open",
        "notebook": "another one, such as paper",
    },
)
def lab(_: Context, lab: str = LAB, notebook: str = "") -> None:
    """Open JupyterLab on the lab's notebook, until Ctrl-C."""
    from notebooks import run as running

    (path,) = running.chosen([notebook or lab])
    running.jupyter_lab(setup.ROOT, path)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in text.split(","))) if text else ()
    except ValueError:
        raise UsageError(f"--{option} {text}", "give numbers, such as 1,10,128") from None


@verb(
    help={
        "k": "only the tests whose names match this expression",
        "fast": "leave out the tests that boot a machine",
    }
)
def test(_: Context, k: str = "", fast: bool = False) -> int:
    """Check the project itself: ruff, mypy, tests."""
    from grader import selftest

    return selftest.run(k, fast)


@verb(
    help={
        "everything": "also .venv, which the next python3 tasks.py makes anew",
        "yes": "do not ask",
    }
)
def clean(_: Context, everything: bool = False, yes: bool = False) -> None:
    """Delete what was built; say how much that freed."""
    from grader import cleaning

    cleaning.run(everything, yes)


@verb(positional=["folder"], help={"folder": "where to write them", "lab": "which lab"})
def starter(_: Context, folder: str, lab: str = LAB) -> None:
    """Write the files that a student starts from."""
    from grader import variant

    for path in variant.write_starter(setup.ROOT / "labs" / lab, Path(folder)):
        print(path)


@verb(
    help={
        "lab": "which lab",
        "out": "the archive (default: <lab>-submission.tar.gz in this folder)",
    }
)
def submit(_: Context, lab: str = LAB, out: str = "") -> None:
    """Pack the lab's files for handing in; say what was left out."""
    from grader import submit as module

    module.run(setup.ROOT, setup.ROOT / "labs" / lab, Path(out or f"{lab}-submission.tar.gz"))


@verb(
    instructors=True,
    positional=["folder"],
    help={
        "folder": "where to make it; must not exist, or be empty",
        "labs": "a list of the labs that students work on (default: all)",
        "source": "a list of labs whose solution is given as source; of the others only as objects",
        "uncommitted": "hand out lab files as they are, though they differ from the last commit",
    },
)
def handout(
    _: Context, folder: str, labs: str = "", source: str = "", uncommitted: bool = False
) -> None:
    """Make the students' repository, without solutions."""
    from grader import handout as module
    from grader.progress import Progress

    module.make(
        setup.ROOT,
        Path(folder),
        labs=_words(labs),
        source=_words(source),
        uncommitted=uncommitted,
        progress=Progress(),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
