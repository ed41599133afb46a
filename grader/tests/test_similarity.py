"""Similar submissions: what a disguise does not change, and what everybody has."""

from __future__ import annotations

import pytest

from grader.similarity import TOKENS, compare, fingerprints, tokens

GIVEN = {
    "lab.c": """
#include "lab.h"
int drain(struct channel *ch)
{
	int count = 0;
	while (waiting(ch) > count && room(ch))
		take(ch, count++);
	return plain(ch, count);
}
"""
}
OWN = """
static unsigned long fold(const unsigned char *bytes, int length)
{
	unsigned long sum = 5381;

	/* one after the other */
	for (int i = 0; i < length; i++)
		sum = ((sum << 5) + sum) ^ bytes[i];
	if (!sum)
		return 1;
	return sum & 0xffff;
}
"""
DISGUISED = """
// entirely my own work
static unsigned long my_hash(const unsigned char *p, int n) {
  unsigned long h = 17; for (int k = 1; k < n; k++) h = ((h << 7) + h) ^ p[k];
  if (!h) return 3; return h & 255; }
"""
OTHER = """
static void walk(struct list *head, void (*visit)(struct item *))
{
	struct item *it = head->first;

	while (it) {
		struct item *next = it->next;

		visit(it);
		it = next;
	}
	head->count -= 1;
}
"""


def _words(text: str) -> str:
    return " ".join(word for word, _ in tokens(text))


def test_names_numbers_comments_and_layout_are_all_the_same() -> None:
    assert _words("int a=1; /* b */ return\n a+0x2f; // c") == (
        "int name = number ; return name + number ;"
    )
    assert _words(OWN) == _words(DISGUISED)
    assert _words('f("a\\"b", \'"\', L"c") /* open') == "name ( text , text , name text )"


def test_every_token_knows_its_line() -> None:
    assert tokens('a /*\n\n*/ b\n"c\\\nd" e') == [
        ("name", 1),
        ("name", 3),
        ("text", 4),
        ("name", 5),
    ]


@pytest.mark.parametrize("unit", ["/*", '"', '"\\', "'", "\t\n", "/", "{", "(", "a ", "1.", "\\\n"])
def test_a_hostile_file_of_the_largest_size_is_no_trouble(unit: str) -> None:
    text = (unit * (256 << 10))[: 256 << 10]
    assert len(fingerprints({"a.c": text}).places) <= 3


def test_a_disguised_copy_is_found_and_says_where() -> None:
    alike = compare(
        [GIVEN],
        {"lab.c": "int nothing;"},
        {
            "a": {"lab.c": GIVEN["lab.c"] + OWN},
            "b": {"lab.c": DISGUISED + GIVEN["lab.c"]},
            "c": {"lab.c": GIVEN["lab.c"] + OTHER},
        },
    )
    (pair,) = alike.pairs
    assert (pair.first, pair.second) == ("a", "b")
    # All but the passages that lead from the one part to the other.
    assert 0.75 < pair.share <= 1
    assert pair.nowhere_else == pair.common >= TOKENS
    assert pair.first_lines == "lab.c: 11-21"
    assert pair.second_lines == "lab.c: 3-5"
    assert alike.median < 0.05


def test_what_everybody_was_given_does_not_count() -> None:
    alike = compare([GIVEN], GIVEN, {"a": GIVEN, "b": {"lab.c": GIVEN["lab.c"] + "\n\n"}})
    assert alike.pairs == ()
    assert alike.own == {"a": 0, "b": 0}
    assert alike.with_solution == {"a": 0, "b": 0}


def test_what_a_third_or_the_solution_has_tells_less() -> None:
    texts = {name: {"lab.c": OWN} for name in "ab"}
    assert compare([GIVEN], {"lab.c": OTHER}, texts).pairs[0].nowhere_else > 0
    assert compare([GIVEN], {"lab.c": OWN}, texts).pairs[0].nowhere_else == 0
    alike = compare([GIVEN], {"lab.c": OWN}, {**texts, "c": {"x.c": OWN + OTHER}})
    assert [pair.nowhere_else for pair in alike.pairs] == [0, 0, 0]
    assert alike.with_solution == {"a": 1, "b": 1, "c": 1}
    assert alike.unique["a"] == alike.unique["b"] == 0
    assert 0 < alike.unique["c"] < alike.own["c"]
    assert alike.median == 1


def test_the_order_does_not_depend_on_the_run() -> None:
    texts = {name: {"lab.c": OWN if name in "ab" else OWN + OTHER} for name in "abcd"}
    pairs = compare([], {}, texts).pairs
    assert pairs == compare([], {}, texts).pairs
    assert [pair.share for pair in pairs] == sorted((p.share for p in pairs), reverse=True)
