"""The library's man pages against its header: every call, every parameter, every errno."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "guest" / "libmegapipe"
MAN = LIBRARY / "man"
ERRNOS = frozenset(name for name in dir(errno) if name.startswith("E"))
# Any text without an end of comment in it.
IN_COMMENT = r"(?:(?!\*/).)*"


@dataclass(frozen=True)
class Call:
    """A function of the header."""

    result: str
    name: str
    parameters: tuple[str, ...]
    errnos: frozenset[str]


def normal(declaration: str) -> str:
    """A declaration with one way to place its blanks."""
    return re.sub(r"\s*\*\s*", " *", " ".join(declaration.split())).strip()


def errnos_in(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\bE[A-Z0-9]+\b", text)) & ERRNOS


def header() -> str:
    return (LIBRARY / "megapipe.h").read_text()


def calls() -> list[Call]:
    found = re.findall(
        rf"/\*({IN_COMMENT})\*/\n((?:\w+\s+)+\**)(mp_\w+)\(([^()]*)\)\s*[;{{]", header(), re.DOTALL
    )
    return [
        Call(
            normal(result),
            name,
            tuple(normal(each) for each in parameters.split(",")),
            errnos_in(comment),
        )
        for comment, result, name, parameters in found
    ]


def common_errnos() -> frozenset[str]:
    """What the header's first comment says of every call that names a handle."""
    first = re.match(rf"/\*({IN_COMMENT})\*/", header(), re.DOTALL)
    assert first
    return errnos_in(first[1].partition("asynchronous")[2])


def members(structure: str) -> list[str]:
    body = re.search(rf"struct {structure} \{{(.*?)\n\}};", header(), re.DOTALL)
    assert body
    plain = re.sub(rf"/\*{IN_COMMENT}\*/", "", body[1], flags=re.DOTALL)
    return [normal(each) for each in plain.split(";") if each.strip()]


def page(name: str, section: int = 3) -> str:
    """The text of a page, wherever it is: a page may consist of a reference to another."""
    text = (MAN / f"{name}.{section}").read_text()
    other = re.fullmatch(r"\.so man(\d)/(\w+)\.(\d)\n", text)
    if not other:
        return text
    assert other[1] == other[3]
    text = (MAN / f"{other[2]}.{other[3]}").read_text()
    assert not text.startswith(".so"), "references do not chain"
    return text


def part(text: str, title: str) -> str:
    found = re.search(rf"^\.Sh {title}\n(.*?)(?=^\.Sh |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no {title}"
    return found[1]


def prototypes(synopsis: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The functions of a SYNOPSIS: result and parameters, by name."""
    found = re.findall(
        r'^\.Ft "?([^"\n]*)"?\n\.Fo (\w+)\n((?:\.Fa .*\n)+)\.Fc$', synopsis, re.MULTILINE
    )
    return {
        name: (
            normal(result),
            tuple(normal(each) for each in re.findall(r'^\.Fa "(.*)"$', arguments, re.MULTILINE)),
        )
        for result, name, arguments in found
    }


def pages() -> list[Path]:
    return sorted(each for each in MAN.iterdir() if each.suffix in {".3", ".7"})


def test_header_is_understood() -> None:
    plain = re.sub(rf"/\*{IN_COMMENT}\*/", "", header(), flags=re.DOTALL)
    names = re.findall(r"^\w.*?\b(mp_\w+)\(", plain, re.MULTILINE)
    assert names
    assert [each.name for each in calls()] == names, "a call has no comment right before it"
    assert common_errnos() >= {"EBADF", "EPERM"}


@pytest.mark.parametrize("call", calls(), ids=lambda call: call.name)
def test_prototype(call: Call) -> None:
    synopsis = part(page(call.name), "SYNOPSIS")
    assert ".In megapipe.h" in synopsis
    assert prototypes(synopsis)[call.name] == (call.result, call.parameters)
    assert re.search(rf"^\.Nm {call.name}\b", part(page(call.name), "NAME"), re.MULTILINE)


@pytest.mark.parametrize("call", calls(), ids=lambda call: call.name)
def test_errnos(call: Call) -> None:
    text = page(call.name)
    wanted = call.errnos | (common_errnos() if "int handle" in call.parameters else frozenset())
    items = re.findall(r"^\.It Bq (.*)$", part(text, "ERRORS"), re.MULTILINE)
    told = {each for item in items for each in re.findall(r"\bEr (E\w+)", item)}
    assert told <= ERRNOS
    assert wanted <= told


def test_no_page_without_a_call() -> None:
    ours = {each.name for each in calls()} | {"mp_event", "megapipe"}
    assert {each.stem for each in pages()} == ours


@pytest.mark.parametrize(
    ("structure", "name"), [("mp_event", "mp_dispatch"), ("mp_options", "mp_create")]
)
def test_structure(structure: str, name: str) -> None:
    text = page(name)
    shown = re.search(rf"^struct {structure} \{{\n(.*?)^\}};$", text, re.DOTALL | re.MULTILINE)
    assert shown
    assert [normal(each) for each in shown[1].split(";") if each.strip()] == members(structure)
    # Not only shown: each has a paragraph of its own.
    for member in members(structure):
        field = re.split(r"[ *]+", member)[-1]
        assert re.search(rf"^\.It Va {field}$", text, re.MULTILINE), field


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_references(path: Path) -> None:
    references = re.findall(r"\bXr (\w+) (\d)", page(path.stem, int(path.suffix[1:])))
    ours = {each for each in references if each[0].startswith(("mp_", "megapipe"))}
    assert ours
    for name, section in ours:
        assert (MAN / f"{name}.{section}").is_file(), f"{name}({section})"


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_parts(path: Path) -> None:
    text = page(path.stem, int(path.suffix[1:]))
    titles = re.findall(r"^\.Sh (.*)$", text, re.MULTILINE)
    assert titles[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]
    assert titles[-1] == "SEE ALSO"
    # A first word like "In" would be taken for a macro.
    assert not re.findall(r"^\.S[hs] [A-Z][a-z] .*", text, re.MULTILINE)
    if path.suffix == ".3":
        assert titles[3:5] == ["RETURN VALUE", "ERRORS"]
