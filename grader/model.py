"""The cost model: counts -> cycles, by weights that are written down with where they come from.

It is a model, and called one wherever it appears. The counts are measured here; what each costs on
a processor is not, for under TCG nothing has a cache or a pipeline. So raw counts are always shown
beside it, and each weight is halved and doubled to see whether a conclusion hangs on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """What one of something costs, in cycles, beside the instructions that it consists of."""

    count: str
    cycles: float
    source: str


WEIGHTS = (
    Weight(
        "instructions",
        1.0,
        "server code runs at about one instruction per cycle: Kanev et al., Profiling a "
        "Warehouse-Scale Computer, ISCA 2015, section 6",
    ),
    Weight(
        "transfers",
        109.0,
        "a load of a line that another core of the same socket has modified, Xeon: David, "
        "Guerraoui, Trigonakis, Everything You Always Wanted to Know About Synchronization, SOSP "
        "2013, table 2 (289 and more from another socket)",
    ),
    Weight(
        "syscalls",
        150.0,
        "entry and exit beside the code: Soares, Stumm, FlexSC, OSDI 2010, section 2.1, before "
        "the mitigations of 2018",
    ),
    Weight(
        "context_switches",
        1000.0,
        "assumed: refilling the pipeline, predictors and the first-level caches",
    ),
    Weight("ipis", 1000.0, "assumed: delivery, and the interrupted pipeline"),
    Weight("doorbells", 100.0, "assumed: a posted write to a device; many times that in a VM"),
)


@dataclass(frozen=True)
class Sensitivity:
    """What becomes of the order of the servers when one weight is another."""

    weight: Weight
    factor: float
    order: tuple[str, ...]
    changed: bool


def cycles(counts: Mapping[str, float], weights: Sequence[Weight] = WEIGHTS) -> float:
    """Return the model's cycles; a count that was not taken (transfers, say) adds nothing."""
    return sum(weight.cycles * counts.get(weight.count, 0.0) for weight in weights)


def order(
    servers: Mapping[str, Mapping[str, float]], weights: Sequence[Weight] = WEIGHTS
) -> tuple[str, ...]:
    """Return the servers' names, cheapest first."""
    return tuple(sorted(servers, key=lambda name: cycles(servers[name], weights)))


def sensitivity(servers: Mapping[str, Mapping[str, float]]) -> list[Sensitivity]:
    """Halve and double each weight: does the order of the servers (name -> counts) change?"""
    usual = order(servers)
    found = []
    for index, weight in enumerate(WEIGHTS):
        for factor in (0.5, 2.0):
            other = Weight(weight.count, weight.cycles * factor, weight.source)
            changed = order(servers, (*WEIGHTS[:index], other, *WEIGHTS[index + 1 :]))
            found.append(Sensitivity(weight, factor, changed, changed != usual))
    return found
