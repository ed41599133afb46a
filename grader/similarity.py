"""Which submissions are alike beyond what everybody was given: pairs for a person to look at.

A file becomes a sequence of C tokens without comments and layout, in which every name is the same
name, every number the same number and every string the same string: neither renaming nor
reformatting changes it. Its fingerprints are all passages of `TOKENS` tokens, less those that
occur in what everybody has (the starter, and the sources around it). Two submissions are as alike
as the share of the smaller one's fingerprints that the other one has, too.

There is only one task, and good solutions of it resemble each other: two independent ones of lab 1
have 8 % in common, those of different labs nothing. The solution's own shares are given for scale.
Nothing here is a verdict.

Winnowing (Schleimer et al., SIGMOD 2003) would keep a sample of the fingerprints; files of a few
hundred tokens need none. copydetect 0.5 does it with hashes that differ from run to run, and takes
what a file repeats for something that was given; the lexers of Pygments need minutes for a file of
blanks. A class's files are of unknown origin: the time here grows with their size, and no faster.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

TOKENS = 12
# Two passages of that length, side by side: some three lines.
LEAST_COMMON = TOKENS
# More than twice what two independent solutions share.
LEAST_SHARE = 0.2

# No alternative fails once it has begun, so that nothing is looked at twice.
_TOKEN = re.compile(
    r"""(?P<nothing> \s+ | //[^\n]* | /\* (?: (?:[^*]|\*(?!/))* ) (?:\*/)? )
    | (?P<text> "(?:\\.|[^"\\\n])*"? | '(?:\\.|[^'\\\n])*'? )
    | (?P<number> \.?[0-9][\w.]* )
    | (?P<name> [^\W\d]\w* )
    | (?P<sign> -> | \+\+ | -- | << | >> | && | \|\| | [-+*/%&|^<>=!]= | . )""",
    re.VERBOSE | re.DOTALL,
)
_KEYWORDS = frozenset(
    "auto bool break case char const continue default do double else enum extern float for goto "
    "if inline int long register return short signed sizeof static struct switch typedef union "
    "unsigned void volatile while".split()
)

Passage = tuple[str, ...]


@dataclass(frozen=True)
class Fingerprints:
    """The passages of one submission's files, and the lines where each begins and ends."""

    places: Mapping[Passage, tuple[tuple[str, int, int], ...]]
    """(file, first line, last line) of each occurrence; lines count from 1."""

    def lines(self, passages: Iterable[Passage]) -> str:
        """Return where these passages lie, in words: ``a.c: 3-9, 17; b.c: 4``."""
        covered: dict[str, set[int]] = {}
        for passage in passages:
            for file, first, last in self.places[passage]:
                covered.setdefault(file, set()).update(range(first, last + 1))
        return "; ".join(f"{file}: {_ranges(covered[file])}" for file in sorted(covered))


@dataclass(frozen=True)
class Pair:
    """Two submissions, by their keys, and what they have in common beyond the given."""

    first: str
    second: str
    common: int
    """Fingerprints that both have."""
    nowhere_else: int
    """Those of them that no third submission has, nor the solution."""
    share: float
    """`common` as a share of the smaller one's fingerprints."""
    first_lines: str
    second_lines: str


@dataclass(frozen=True)
class Similarity:
    """The pairs worth a look, the most alike first, and what to hold them against."""

    pairs: tuple[Pair, ...]
    median: float
    """The share of the median pair, of all there are; 0 without a pair."""
    with_solution: Mapping[str, float]
    """The share that each submission has in common with the solution."""
    own: Mapping[str, int]
    """How many fingerprints each submission has beyond the given."""
    unique: Mapping[str, int]
    """Those of them that no other submission has, nor the solution."""


def tokens(text: str) -> list[tuple[str, int]]:
    """Return the normalised tokens of a C source, each with its line."""
    found = []
    line = 1
    for match in _TOKEN.finditer(text):
        kind, word = match.lastgroup, match[0]
        if kind == "name":
            found.append((word if word in _KEYWORDS else "name", line))
        elif kind in ("text", "number"):
            found.append((kind, line))
        elif kind == "sign":
            found.append((word, line))
        line += word.count("\n")
    return found


def fingerprints(files: Mapping[str, str]) -> Fingerprints:
    """Return every passage of these files; `files` are texts by name."""
    places: dict[Passage, list[tuple[str, int, int]]] = {}
    for name, text in files.items():
        found = tokens(text)
        words = tuple(word for word, _ in found)
        for start in range(len(found) - TOKENS + 1):
            passage = words[start : start + TOKENS]
            where = (name, found[start][1], found[start + TOKENS - 1][1])
            places.setdefault(passage, []).append(where)
    return Fingerprints({passage: tuple(where) for passage, where in places.items()})


def compare(
    given: Iterable[Mapping[str, str]],
    solution: Mapping[str, str],
    submissions: Mapping[str, Mapping[str, str]],
) -> Similarity:
    """Compare every submission with every other; each is a table of texts by file name.

    `given` is what everybody has: what occurs there does not count.
    """
    everybody: set[Passage] = set()
    for files in given:
        everybody |= fingerprints(files).places.keys()
    prints = {key: fingerprints(files) for key, files in submissions.items()}
    own = {key: found.places.keys() - everybody for key, found in prints.items()}
    solved = fingerprints(solution).places.keys() - everybody
    holders = Counter(passage for passages in own.values() for passage in passages)
    pairs = []
    shares = []
    for first, second in combinations(own, 2):
        common = own[first] & own[second]
        share = _share(len(common), own[first], own[second])
        shares.append(share)
        if share >= LEAST_SHARE and len(common) >= LEAST_COMMON:
            pairs.append(
                Pair(
                    first=first,
                    second=second,
                    common=len(common),
                    nowhere_else=sum(holders[p] == 2 and p not in solved for p in common),
                    share=share,
                    first_lines=prints[first].lines(common),
                    second_lines=prints[second].lines(common),
                )
            )
    pairs.sort(key=lambda pair: (-pair.share, -pair.nowhere_else, pair.first, pair.second))
    return Similarity(
        pairs=tuple(pairs),
        median=statistics.median(shares) if shares else 0.0,
        with_solution={key: _share(len(own[key] & solved), own[key], solved) for key in own},
        own={key: len(passages) for key, passages in own.items()},
        unique={
            key: sum(holders[p] == 1 and p not in solved for p in passages)
            for key, passages in own.items()
        },
    )


def _share(common: int, *sides: set[Passage]) -> float:
    smaller = min(map(len, sides))
    return common / smaller if smaller else 0.0


def _ranges(lines: set[int]) -> str:
    ranges: list[list[int]] = []
    for line in sorted(lines):
        if ranges and line == ranges[-1][1] + 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in ranges)
