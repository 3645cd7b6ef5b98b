"""Checks that runs of one seed began alike: the same weights, the same data in the same order, the same dropout.

Nothing in a comparison may change them. A v0, its statistics pass and the dry run of an unknown optimizer put every random state
back, so runs that differ in optimizer, warmup, learning rate or v0 have equal fingerprints, `rng` too; one that has not is
reported, never excused. Only arguments of model or data (another width, another batch size) make a difference that is expected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .results import RunResult, list_model_arguments

PARTS = {
    "initial_weights": "other initial weights",
    "batches": "other first batches",
    "rng": "another random state before the first step, so other dropout",
}


@dataclass
class FingerprintCheck:
    """What was found: `violations` and `expected` differences in words, and the runs with a record but no fingerprint."""

    num_checked: int = 0
    violations: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    seeds: set[int] = field(default_factory=set)  # that have a violation


def check_fingerprints(runs: Sequence[RunResult]) -> FingerprintCheck:
    """Compare the fingerprints of the runs of each seed, apart for each set of model and data arguments."""
    check = FingerprintCheck()
    groups: dict[tuple[int, tuple[str, ...]], list[RunResult]] = {}
    for run in runs:
        if run.fingerprint is not None:
            check.num_checked += 1
            groups.setdefault((run.seed, list_model_arguments(run)), []).append(run)
        elif run.is_counted:
            check.unchecked.append(run.name)
    for (seed, _), group in groups.items():
        for part, words in PARTS.items():
            usual = _find_usual(group, part)
            odd = [run.name for run in group if not _agree(_read_part(run, part), usual)]
            if odd:
                check.seeds.add(seed)
                names = ", ".join(odd)
                check.violations.append(
                    f"seed {seed}: {words} in {len(odd)} of {len(group)} runs that should begin alike: {names}"
                )
    _add_expected(check, groups)
    return check


def _add_expected(check: FingerprintCheck, groups: dict[tuple[int, tuple[str, ...]], list[RunResult]]) -> None:
    for seed in sorted({seed for seed, _ in groups}):
        of_seed = {other: group for (s, other), group in groups.items() if s == seed}
        first = next(iter(of_seed))
        for other, group in of_seed.items():
            differing = [
                part
                for part in PARTS
                if not _agree(_find_usual(group, part), _find_usual(of_seed[first], part)) and other != first
            ]
            if differing:
                arms = ", ".join(dict.fromkeys(run.arm for run in group))
                reason = _name_difference(other, first)
                found = "; ".join(PARTS[part] for part in differing)
                check.expected.append(f"seed {seed}, {arms}: {found}, as is to be expected from {reason}")


def _name_difference(other: tuple[str, ...], first: tuple[str, ...]) -> str:
    return ", ".join(sorted({item.split("=")[0] for item in set(other) ^ set(first)}))


def _find_usual(group: Sequence[RunResult], part: str) -> tuple:
    """The value that most runs of the group have; of equally frequent ones the first, of batches the longest list."""
    counts = Counter(_read_part(run, part) for run in group)
    return max(counts, key=lambda value: (counts[value], len(value)))


def _read_part(run: RunResult, part: str) -> tuple:
    value = run.fingerprint.get(part)
    return tuple(value) if isinstance(value, list) else (value,)


def _agree(one: tuple, other: tuple) -> bool:
    """Whether they are equal as far as both go: a run that ended within four steps has fewer batches."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]
