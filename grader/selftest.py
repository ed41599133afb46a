"""The project's check of itself: style, types and tests, in the order of what they cost."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from grader import setup

PYTHON_FILES = ("tasks.py", "grader", "kernel", "images", "notebooks")


def run(expression: str = "", fast: bool = False) -> int:
    """Run the checkers, each to its end; return 0 if all of them are content, else 1.

    `expression` selects tests by name as pytest's ``-k`` does; `fast` leaves out those that are
    marked ``vm``. A checker that is not installed is named and counts as a failure.
    """
    results = {}
    for name, arguments in _steps(expression, fast).items():
        print(f"== {name}", flush=True)
        results[name] = _run(arguments)
    print("; ".join(f"{name}: {result}" for name, result in results.items()))
    return 0 if set(results.values()) == {"ok"} else 1


def _steps(expression: str, fast: bool) -> dict[str, list[str]]:
    # Folders come as the project grows, and mypy takes it ill if one holds no Python.
    files = [name for name in PYTHON_FILES if any((setup.ROOT / name).rglob("*.py"))]
    files += [name for name in PYTHON_FILES if (setup.ROOT / name).is_file()]
    tests = ["pytest"]
    tests += ["-k", expression] if expression else []
    tests += ["-m", "not vm"] if fast else []
    return {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy", *files],
        "tests": tests,
    }


def _run(arguments: list[str]) -> str:
    if importlib.util.find_spec(arguments[0]) is None:
        print(f"{arguments[0]} is not there: run   python3 tasks.py test   to install it")
        return "absent"
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=setup.ROOT, check=False)
    return "ok" if done.returncode == 0 else "failed"
