from __future__ import annotations

from collections.abc import Iterator

import pytest

from grader import limits


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    limits.factor.cache_clear()
    yield
    limits.factor.cache_clear()


def test_the_environment_overrides_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(limits.ENVIRONMENT_VARIABLE, "2.5")
    assert limits.factor() == 2.5
    assert limits.scaled(4) == 10


@pytest.mark.parametrize("value", ["", "fast", "0", "-1", "nan", "inf"])
def test_a_bad_override_is_an_error_that_names_it(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(limits.ENVIRONMENT_VARIABLE, value)
    with pytest.raises(limits.BadFactor, match=limits.ENVIRONMENT_VARIABLE):
        limits.factor()


def test_measured_once_and_never_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(limits.ENVIRONMENT_VARIABLE, raising=False)
    assert limits.factor() >= 1
    assert limits.factor() == limits.factor()
