"""What a student's file must not contain, and what its object must not refer to.

The rules themselves are data: ``rules.toml``. `check_source` looks at the words of a file before
it is compiled; a compiler's own preprocessor could not tell the student's words from those of the
kernel's headers. `check_object` looks at what the compiler made of it, and decides whatever the
words cannot: where the code lies, what it defines and what it refers to.

These rules keep a submission from reaching into the build and from taking over names that are not
its own, and make plain what it calls. They do not confine what it does once it runs: THREATS.md.
"""

from __future__ import annotations

import bisect
import functools
import io
import itertools
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

from grader import cache
from grader.errors import UserError

TABLE = Path(__file__).with_name("rules.toml")

Kind = Literal["kernel", "library"]

_SHF_ALLOC = 2
# By type: the addend of a relocation that means the symbol itself.
_TO_ITSELF = {
    "R_X86_64_64": 0,
    "R_X86_64_32": 0,
    "R_X86_64_32S": 0,
    "R_X86_64_PC32": -4,
    "R_X86_64_PLT32": -4,
    "R_X86_64_GOTPCREL": -4,
    "R_X86_64_GOTPCRELX": -4,
    "R_X86_64_REX_GOTPCRELX": -4,
}


class RulesError(UserError):
    """rules.toml says something that cannot be."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{TABLE.name}: {problem}", "correct the file")


@dataclass(frozen=True)
class Group:
    """Names (patterns) that are allowed or forbidden together, and why."""

    names: tuple[str, ...]
    reason: str
    kind: str = ""
    """The kind of file that this is for; empty: every kind."""
    debug: bool = False
    """Only where the kernel's checkers are compiled in."""

    def holds(self, name: str) -> bool:
        """Whether one of the patterns fits."""
        return any(fnmatchcase(name, pattern) for pattern in self.names)


@dataclass(frozen=True)
class Violation:
    """A rule that a file breaks, and where; line 0: nowhere in particular."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: error: not allowed here: {self.what}"


@dataclass(frozen=True)
class FileRules:
    """The rules for one of the labs' files."""

    name: str
    kind: Kind
    defines: tuple[str, ...]
    headers: tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """All of rules.toml."""

    files: Mapping[str, FileRules]
    directives: frozenset[str]
    attributes: frozenset[str]
    forbidden: tuple[Group, ...]
    sections: tuple[Group, ...]
    symbols: tuple[Group, ...]


def check_sources(contents: Mapping[str, bytes]) -> str:
    """Return what the students' files among these break, as a compiler prints its errors."""
    found: list[Violation] = []
    for name, content in contents.items():
        if file := of(name):
            found += check_source(file, content.decode(errors="replace"))
    return _text(found)


def check_objects(
    contents: Mapping[str, bytes],
    objects: Mapping[str, bytes],
    functions: Collection[str] = (),
    debug: bool = False,
) -> str:
    """Return what these files' `objects`, by the files' names, break; see `check_object`."""
    found: list[Violation] = []
    for name, content in contents.items():
        if file := of(name):
            source = content.decode(errors="replace")
            found += check_object(file, objects[name], source, functions, debug)
    return _text(found)


def of(name: str) -> FileRules | None:
    """Return the rules for a file of this name, or None if it is not a student's."""
    return _rules().files.get(name)


def key() -> str:
    """Return what stands for these rules in the key of what has passed them."""
    return cache.digest(TABLE, Path(__file__))


def _text(violations: Sequence[Violation]) -> str:
    return "".join(f"{violation}\n" for violation in violations)


@functools.cache
def _rules() -> Rules:
    try:
        return read(tomllib.loads(TABLE.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise RulesError(str(error)) from error


def read(table: Mapping[str, Any]) -> Rules:
    """Turn the content of a rules.toml into rules; raises `RulesError`."""
    try:
        files = {}
        for name, entry in table["files"].items():
            if entry["kind"] not in get_args(Kind):
                raise RulesError(f"{name}: kind is none of {', '.join(get_args(Kind))}")
            headers = tuple(table[entry["kind"]]["headers"].split())
            files[name] = FileRules(name, entry["kind"], tuple(entry["defines"]), headers)
        return Rules(
            files=files,
            directives=frozenset(table["source"]["directives"].split()),
            attributes=frozenset(table["source"]["attributes"].split()),
            forbidden=_groups(table["source"]["forbidden"]),
            sections=_groups(table["sections"]),
            symbols=_groups(table["symbols"]),
        )
    except (KeyError, TypeError) as error:
        raise RulesError(f"missing or unknown key: {error}") from error


def _groups(entries: Sequence[Mapping[str, Any]]) -> tuple[Group, ...]:
    return tuple(Group(**{**entry, "names": tuple(entry["names"].split())}) for entry in entries)


# ---------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int
    first: bool
    """Nothing but space and comments stands before it on its line."""


# As the C preprocessor sees them once lines are joined. An unmatched quote takes the rest of its
# line, as there: otherwise what follows could pass for a comment here and for code there.
_TOKEN = re.compile(
    r"""
      (?P<space>[ \t\f\v\r]+)
    | (?P<newline>\n)
    | (?P<comment>//[^\n]* | /\*.*?(?:\*/|\Z))
    | (?P<raw>(?:u8|[uUL])?R")
    | (?P<string>(?:u8|[uUL])?"(?:\\.|[^"\\\n])*(?:"|(?=\n)|\Z))
    | (?P<character>(?:u8|[uUL])?'(?:\\.|[^'\\\n])*(?:'|(?=\n)|\Z))
    | (?P<name>[^\W\d][\w$]*|\$[\w$]*)
    | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    | (?P<punctuation>%:%:|\#\#|%:|\[\[|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_SPLICE = re.compile(r"\\[ \t\f\v]*\r?\n")
_INCLUDE = re.compile(r'#[ \t]*include[ \t]*(<[^>\n]*>|"[^"\n]*")')


class _Source:
    """A file's tokens without comments, each with the line on which it stands."""

    def __init__(self, content: str) -> None:
        self.includes: list[tuple[int, str]] = []
        """Line and name of each header, with its quotes or brackets."""
        self.tokens: list[_Token] = []
        joined, starts = self._join(content)
        position, first = 0, True
        while match := _TOKEN.match(joined, position):
            position = match.end()
            kind, found = match.lastgroup or "", match[0]
            if kind == "newline":
                first = True
            elif kind not in ("space", "comment"):
                line = bisect.bisect_right(starts, match.start())
                included = _INCLUDE.match(joined, match.start()) if first else None
                if included:
                    self.includes.append((line, included[1]))
                    position = included.end()
                else:
                    self.tokens.append(_Token(kind, found, line, first))
                first = False

    @staticmethod
    def _join(content: str) -> tuple[str, list[int]]:
        """Return the text with continued lines joined, and where in it each line begins."""
        parts: list[str] = []
        starts, length, last = [0], 0, 0
        for match in re.finditer(rf"{_SPLICE.pattern}|\n", content):
            kept = content[last : match.start()] + ("\n" if match[0] == "\n" else "")
            parts.append(kept)
            length += len(kept)
            starts.append(length)
            last = match.end()
        return "".join(parts) + content[last:], starts

    def line_of(self, name: str) -> int:
        """Return the first line where a name stands, or 0."""
        return next((token.line for token in self.tokens if token.text == name), 0)


def check_source(file: FileRules, content: str) -> list[Violation]:
    """Return which rules the words of a file break, in the order of its lines."""
    source = _Source(content)
    found = [
        *_check_includes(file, source),
        *_check_directives(source),
        *_check_attributes(source),
        *_check_names(source),
        *_check_tokens(source),
    ]
    return [Violation(file.name, line, what) for line, what in sorted(set(found))]


def _check_includes(file: FileRules, source: _Source) -> Iterator[tuple[int, str]]:
    for line, quoted in source.includes:
        name = quoted[1:-1]
        # Patterns do not stop at slashes.
        plain = re.fullmatch(r"[\w+-]+(/[\w+-]+)*\.h", name)
        if not plain or not any(_fits(name, pattern) for pattern in file.headers):
            yield line, f"#include {quoted}: of headers, only {' '.join(file.headers)}"


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _check_directives(source: _Source) -> Iterator[tuple[int, str]]:
    for token, after in itertools.pairwise([*source.tokens, None]):
        assert token is not None
        if not (token.first and token.text in ("#", "%:")):
            continue
        if token.text == "%:":
            yield token.line, "%: for #"
        elif after is None or after.first:
            continue
        elif after.text == "include":
            yield token.line, 'an #include that is not plainly one: write #include "name.h"'
        elif after.text not in _rules().directives:
            yield token.line, f"#{after.text}: of directives, only {_listed(_rules().directives)}"


def _check_attributes(source: _Source) -> Iterator[tuple[int, str]]:
    tokens = source.tokens
    for index, token in enumerate(tokens):
        if token.text not in ("__attribute__", "__attribute"):
            continue
        depth = 0
        for inner in tokens[index + 1 :]:
            depth += {"(": 1, ")": -1}.get(inner.text, 0)
            if depth == 0:
                break
            name = inner.text.removeprefix("__").removesuffix("__")
            if depth == 2 and inner.kind == "name" and name not in _rules().attributes:
                allowed = _listed(_rules().attributes)
                yield inner.line, f"the attribute {inner.text}: of attributes, only {allowed}"


def _check_names(source: _Source) -> Iterator[tuple[int, str]]:
    for token in source.tokens:
        if token.kind == "name":
            for group in _rules().forbidden:
                if group.holds(token.text):
                    yield token.line, f"{token.text} ({group.reason})"


_TOKENS = {
    "##": "## (names put together by macros: write them out)",
    "%:%:": "%:%: for ##",
    "[[": "an attribute in [[ ]]: write __attribute__(( ))",
    "\\": "a backslash that is neither in a string nor at the end of a line",
}


def _check_tokens(source: _Source) -> Iterator[tuple[int, str]]:
    for token in source.tokens:
        if token.kind == "raw":
            yield token.line, "a raw string"
        elif token.kind == "punctuation" and token.text in _TOKENS:
            yield token.line, _TOKENS[token.text]


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


# ---------------------------------------------------------------------------------------- objects


def check_object(
    file: FileRules,
    content: bytes,
    source: str,
    functions: Collection[str] = (),
    debug: bool = False,
) -> list[Violation]:
    """Return which rules the compiled file breaks.

    `source` is what it was compiled from, to find lines in. `functions` are the kernel's, which
    may only be entered where they begin. `debug` allows what the kernel's checkers need.
    """
    try:
        elf = ELFFile(io.BytesIO(content))
        found = [
            *_check_sections(file, elf, debug),
            *_check_symbols(file, elf, debug),
            *_check_relocations(elf, functions),
        ]
    except (ELFError, UnicodeDecodeError) as error:
        return [Violation(file.name, 0, f"an object that cannot be read ({error})")]
    words = _Source(source)
    lines = {name: words.line_of(name) for name, _ in found}
    return [Violation(file.name, lines[name], what) for name, what in sorted(set(found))]


def _allowed(groups: Sequence[Group], name: str, file: FileRules, debug: bool) -> bool:
    return any(
        group.kind in ("", file.kind) and group.debug <= debug and group.holds(name)
        for group in groups
    )


def _check_sections(file: FileRules, elf: ELFFile, debug: bool) -> Iterator[tuple[str, str]]:
    for section in elf.iter_sections():
        name = section.name
        if section["sh_type"] in ("SHT_RELA", "SHT_REL"):
            name = elf.get_section(section["sh_info"]).name
        if name and not _allowed(_rules().sections, name, file, debug):
            yield name, f"the section {name} (code or data that is moved, or done at start)"


def _check_symbols(file: FileRules, elf: ELFFile, debug: bool) -> Iterator[tuple[str, str]]:
    for symbol in _symbols(elf):
        name = symbol.name
        undefined = symbol["st_shndx"] == "SHN_UNDEF"
        if symbol["st_info"]["type"] in ("STT_GNU_IFUNC", "STT_LOOS"):
            yield name, f"{name} (a function that is chosen at start)"
        if not name:
            continue
        if undefined and not _allowed(_rules().symbols, name, file, debug):
            yield name, f"{name}: it is not among the names that this file may use ({TABLE.name})"
        local = symbol["st_info"]["bind"] == "STB_LOCAL"
        if not undefined and not local and name not in file.defines:
            yield name, f"{name} can be seen by other files: make it static"


def _check_relocations(elf: ELFFile, functions: Collection[str]) -> Iterator[tuple[str, str]]:
    if not functions:
        return
    for section in elf.iter_sections():
        if not isinstance(section, RelocationSection):
            continue
        place = elf.get_section(section["sh_info"])
        if not place["sh_flags"] & _SHF_ALLOC:
            continue
        symbols = elf.get_section(section["sh_link"])
        assert isinstance(symbols, SymbolTableSection)
        for relocation in section.iter_relocations():
            symbol = symbols.get_symbol(relocation["r_info_sym"])
            if symbol["st_shndx"] != "SHN_UNDEF" or symbol.name not in functions:
                continue
            kind = _relocation_types().get(relocation["r_info_type"], "")
            # objtool's own table: the low bits say what kind of call it is (static_call_types.h).
            flags = relocation["r_addend"] if symbol.name.startswith("__SCT__") else -1
            if place.name == ".static_call_sites" and kind == "R_X86_64_PC32" and 0 <= flags < 4:
                continue
            if relocation["r_addend"] != _TO_ITSELF.get(kind):
                yield symbol.name, f"an address inside {symbol.name}(): call it by its name"


@functools.cache
def _relocation_types() -> Mapping[int, str]:
    from elftools.elf.enums import ENUM_RELOC_TYPE_x64  # noqa: PLC0415

    return {number: name for name, number in ENUM_RELOC_TYPE_x64.items() if name != "_default_"}


def _symbols(elf: ELFFile) -> Iterator[Any]:
    for section in elf.iter_sections():
        if isinstance(section, SymbolTableSection):
            yield from section.iter_symbols()
