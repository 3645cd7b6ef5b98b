"""Error rates of the verdicts, by simulation on the functions that make them: the choice on one seed, the judgement on fresh ones.

pytest -m slow tests/compare/test_simulation.py -s      # prints the power as well
"""

import math

import numpy as np
import pandas as pd
import pytest

from hf_v0init.compare.plan import NONE, V0, WARMUP
from hf_v0init.compare.stages import choose_settings
from hf_v0init.compare.statistics import Verdict, judge_contrasts, judge_replacement
from hf_v0init.compare.summary import PLANNED

NUM_DRAWS = 1000
FAMILIES = (NONE, WARMUP, V0)
LEVEL = 4.0  # of the loss; its noise below is in nats, of which a seed's own share is common to all settings
SEED_STD, RUN_STD = 0.1, 0.05
PAIRED_STD = RUN_STD * math.sqrt(2)
MARGIN = 0.04  # 1% of the level


def draw(generator, seeds, means) -> np.ndarray:
    """Losses by setting and seed: what the seed does to all of them, and what is each run's own."""
    shared = generator.normal(0.0, SEED_STD, len(seeds))
    return LEVEL + np.asarray(means)[:, None] + shared + generator.normal(0.0, RUN_STD, (len(means), len(seeds)))


def simulate(generator, num_seeds: int, num_settings: int, shifts: dict[str, float]):
    """One comparison: tuned on seed 0 among equal settings of each family, confirmed on fresh seeds. Returns its contrasts."""
    names = [(family, i) for family in FAMILIES for i in range(num_settings)]
    means = [shifts.get(family, 0.0) for family, _ in names]
    table = pd.DataFrame(
        {
            "stage": "tune",
            "state": "finished",
            "condition": "",
            "family": [family for family, _ in names],
            "setting": [f"{family} {i}" for family, i in names],
            "learning_rate": 1e-3,
            "seed": 0,
            "scored_loss": draw(generator, [0], means)[:, 0],
        }
    )
    chosen = choose_settings(table)
    assert [choice.family for choice in chosen] == list(FAMILIES)
    fresh = list(range(1, num_seeds + 1))
    losses = draw(generator, fresh, means)
    by_name = {f"{family} {i}": row for (family, i), row in zip(names, losses, strict=True)}
    confirmed = {choice.family: dict(zip(fresh, map(float, by_name[choice.setting]), strict=True)) for choice in chosen}
    return judge_contrasts(confirmed, PLANNED), confirmed


def count(
    num_seeds: int, num_settings: int, shifts: dict[str, float], margin: float | None = MARGIN
) -> dict[str, float]:
    """Rates over the draws: any contrast decided, v0 said to be better or worse than the warmup, v0 said to be able to replace it."""
    generator = np.random.default_rng(1000 * num_seeds + num_settings)
    counts = dict.fromkeys(("any", "better", "worse", "can replace"), 0)
    for _ in range(NUM_DRAWS):
        contrasts, confirmed = simulate(generator, num_seeds, num_settings, shifts)
        first = contrasts[0]
        assert (first.one, first.other) == (V0, WARMUP)
        counts["any"] += any(contrast.verdict in (Verdict.BETTER, Verdict.WORSE) for contrast in contrasts)
        counts["better"] += first.verdict is Verdict.BETTER
        counts["worse"] += first.verdict is Verdict.WORSE
        edge = 0.01 * np.mean(list(confirmed[WARMUP].values())) if margin is None else margin
        replaced = judge_replacement(first.interval, edge).verdict
        counts["can replace"] += replaced is Verdict.CAN_REPLACE
    return {name: number / NUM_DRAWS for name, number in counts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("num_settings", [1, 4, 16])
def test_false_winners_are_as_rare_as_they_should_be(num_seeds, num_settings):
    """Everything is equal: a winner of any of the three contrasts is false."""
    rates = count(num_seeds, num_settings, {})
    print(f"\n{num_seeds} seeds, {num_settings} settings per family: false winners {rates['any']:.1%}")
    assert rates["any"] <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("num_settings", [1, 16])
@pytest.mark.parametrize("margin", [MARGIN, None], ids=["absolute", "1% of the warmup"])
def test_false_replacements_at_the_edge_of_the_margin_are_rare(num_seeds, num_settings, margin):
    """v0 is worse by just the margin, so that it cannot replace the warmup."""
    rates = count(num_seeds, num_settings, {V0: MARGIN}, margin)
    print(f"\n{num_seeds} seeds, {num_settings} settings per family: false 'can replace' {rates['can replace']:.1%}")
    assert rates["can replace"] <= 0.06


@pytest.mark.slow
def test_the_power_is_printed_and_grows_with_seeds_and_effect():
    """In standard deviations of the paired difference; 'can replace' where v0 is as good, by the margin in the same unit."""
    print("\nseeds  effect: found better      margin: can replace, when equal")
    power, replaced = {}, {}
    for num_seeds in (3, 5, 10):
        for size in (0.5, 1.0, 2.0, 4.0):
            power[num_seeds, size] = count(num_seeds, 4, {V0: -size * PAIRED_STD})["better"]
            replaced[num_seeds, size] = count(num_seeds, 4, {}, size * PAIRED_STD)["can replace"]
            print(
                f"{num_seeds:5}  {size:.1f} sd: {power[num_seeds, size]:19.0%}  {size:.1f} sd: {replaced[num_seeds, size]:19.0%}"
            )
    assert power[10, 2.0] > 0.9 and power[3, 0.5] < power[3, 4.0] and power[3, 2.0] < power[5, 2.0] < power[10, 2.0]
    assert replaced[10, 2.0] > 0.9 and replaced[3, 2.0] < replaced[5, 2.0] < replaced[10, 2.0]
