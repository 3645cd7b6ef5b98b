"""Every answer of the conclusion, from runs made to give it."""

import json
import random

import pytest
from comparison_folders import make_entry, write_grid, write_plan, write_run

from hf_v0init.compare.reading.fingerprints import check_fingerprints
from hf_v0init.compare.reading.results import read_comparison
from hf_v0init.compare.reading.summary import compute_summary
from hf_v0init.compare.reporting.conclusion import compose_conclusion

SPREAD = {1: 0.0, 2: 0.02, 3: -0.02, 4: 0.01, 5: -0.01}  # the seeds' own, shared by all arms
NOISE = {1: 0.004, 2: -0.003, 3: -0.001, 4: 0.002, 5: -0.002}  # of v0 against the rest


def conclude(folder):
    comparison = read_comparison(folder)
    return compose_conclusion(compute_summary(comparison), check_fingerprints(comparison.runs))


def conclude_on(folder, plain, warmup, v0, *, seeds=(1, 2, 3), noise=1.0, rates=(1e-3,), **plan):
    """Three arms with these final losses, numbers or states, or functions of the learning rate."""
    finals = {("zeros", "none"): plain, ("zeros", "200"): warmup, ("data_driven 10", "none"): v0}

    def outcome(strategy, length, rate, seed):
        final = finals[strategy, length]
        final = final(rate) if callable(final) else final
        if not isinstance(final, float):
            return final
        return final + SPREAD[seed] + (noise * NOISE[seed] if strategy != "zeros" else 0.0)

    return conclude(write_grid(folder, outcome, seeds=seeds, rates=rates, **plan))


def get_point(conclusion, topic):
    return dict(conclusion.points)[topic]


@pytest.mark.parametrize(
    ("plain", "warmup", "v0", "verdict", "words", "use"),
    [
        (5.0, 2.0, 1.9, "v0_wins", "v0 beats the best warmup here", "data_driven 10"),
        (
            5.0,
            2.0,
            2.0,
            "no_difference",
            "v0 can replace the warmup here, as far as 3 seeds can tell",
            "data_driven 10",
        ),
        (5.0, 2.0, 2.3, "warmup_wins", "The warmup is better here", "warmup 200"),
        (2.2, 2.0, 2.2, "v0_does_not_help", "v0 does not help here", "warmup 200"),
        (2.2, 2.0, 2.4, "v0_does_not_help", "not better than a plain start", "warmup 200"),
        (2.0, 2.0, 2.0, "neither_needed", "Neither a warmup nor a v0 is needed here", "zeros"),
        (1.8, 2.0, 2.1, "plain_wins", "Neither a warmup nor a v0 helps here", "zeros"),
        (5.0, "diverged", 2.0, "v0_wins", "v0 beats the best warmup here", "data_driven 10"),
        (5.0, 2.0, "diverged", "v0_does_not_help", "v0 does not help here", "warmup 200"),
        ("diverged", 2.0, 2.0, "no_difference", "v0 can replace the warmup here", "data_driven 10"),
    ],
)
def test_the_answer_follows_from_the_numbers(tmp_path, plain, warmup, v0, verdict, words, use):
    conclusion = conclude_on(tmp_path, plain, warmup, v0)
    assert conclusion.verdict == verdict and words in conclusion.headline
    assert get_point(conclusion, "Use").startswith((f"`{use}`", f"Either: `{use}`"))


def test_seeds_that_differ_too_much_leave_it_undecided(tmp_path):
    conclusion = conclude_on(tmp_path, 5.0, 2.0, 2.0, noise=40.0)
    assert conclusion.verdict == "undecided" and conclusion.headline.startswith("Undecided")
    assert "more than 5% of the loss" in get_point(conclusion, "Beyond noise?")
    assert get_point(conclusion, "Use").startswith("Nothing yet")


def test_a_plain_start_that_ends_lower_is_advised_where_v0_does_not_help(tmp_path):
    conclusion = conclude_on(tmp_path, 1.98, 2.0, 2.3, seeds=(1, 2))
    assert conclusion.verdict == "plain_wins" and get_point(conclusion, "Use").startswith("`zeros`")


def test_five_seeds_settle_what_three_leave_open(tmp_path):
    assert conclude_on(tmp_path / "three", 5.0, 2.0, 1.995).verdict == "no_difference"
    assert conclude_on(tmp_path / "five", 5.0, 2.0, 1.995, seeds=(1, 2, 3, 4, 5)).verdict == "v0_wins"


def test_one_seed_decides_nothing(tmp_path):
    conclusion = conclude_on(tmp_path, 5.0, 2.0, 1.5, seeds=(1,))
    assert conclusion.verdict == "too_few_seeds" and "0.496 below" in conclusion.headline
    assert "there is no interval" in get_point(conclusion, "Beyond noise?")
    assert "1 seed: too few" in get_point(conclusion, "Mind")


def test_two_seeds_decide_only_what_is_clear(tmp_path):
    assert conclude_on(tmp_path / "same", 5.0, 2.0, 2.0, seeds=(1, 2)).verdict == "too_few_seeds"
    conclusion = conclude_on(tmp_path / "clear", 5.0, 2.0, 1.5, seeds=(1, 2))
    assert conclusion.verdict == "v0_wins" and "2 seeds: too few" in get_point(conclusion, "Mind")


def test_nothing_finished_says_so(tmp_path):
    conclusion = conclude_on(tmp_path, None, "running", "failed")
    assert conclusion.verdict == "nothing_finished" and conclusion.headline == "No run has a result yet; 3 runs failed."


def test_everything_diverged_says_so(tmp_path):
    conclusion = conclude_on(tmp_path, "diverged", "diverged", "diverged")
    assert conclusion.verdict == "all_diverged" and "Every run that has ended diverged" in conclusion.headline
    assert "smaller learning rates" in get_point(conclusion, "What next")


def test_a_missing_side_is_named(tmp_path):
    conclusion = conclude_on(tmp_path / "warmup", 5.0, None, 2.0)
    assert (
        conclusion.verdict == "no_warmup"
        and "3.000 below `zeros`, the plain start, beyond noise" in conclusion.headline
    )
    conclusion = conclude_on(tmp_path / "v0", 5.0, 2.0, None)
    assert conclusion.verdict == "no_v0" and "`warmup 200`" in get_point(conclusion, "Best so far")
    entries = [make_entry("zeros", "200", 1e-3, 1), make_entry("random 100", "none", 1e-3, 2)]
    write_plan(tmp_path / "seeds", entries)
    for entry in entries:
        write_run(tmp_path / "seeds", entry, 2.0)
    assert conclude(tmp_path / "seeds").verdict == "no_shared_seed"


def test_steps_saved_are_charged_with_the_pass(tmp_path):
    """The warmup takes 400 steps to 3, v0 250 and 20 of the pass: 130 are saved, 32%, and 28 s against 40 s."""
    entries = [make_entry(v0, w, 1e-3, s) for s in (1, 2, 3) for v0, w in (("zeros", "200"), ("data_driven 1", "none"))]
    write_plan(tmp_path, entries)
    for entry in entries:
        curve = [9.0, 8.0, 6.0, 4.0, 3.0] if entry["v0"] == "zeros" else [9.0, 6.0, 4.0, 2.0, 1.0]
        write_run(tmp_path, entry, curve[-1], losses=curve)
    text = get_point(conclude(tmp_path), "What it saves")
    for words in (
        "after 250 steps (270 with the samples",
        "after 400: 130 steps (32%) saved",
        "28.0 s with the pass against 40.0 s",
    ):
        assert words in text


def test_no_steps_are_saved_where_the_loss_is_not_reached(tmp_path):
    assert get_point(conclude_on(tmp_path / "none", 5.0, 2.0, 2.3), "What it saves").startswith("No steps")
    finals = {("zeros", "200"): [3.0, 3.0, 3.0], ("data_driven 10", "none"): [2.0, 2.5, 3.5]}
    folder = write_grid(tmp_path / "some", lambda v0, w, r, s: finals[v0, w][s - 1], arms=list(finals))
    assert "2 of 3 runs" in get_point(conclude(folder), "What it saves")


def test_the_gain_over_a_plain_start_is_said(tmp_path):
    text = get_point(conclude_on(tmp_path, 5.0, 2.0, 2.3), "Against a plain start")
    assert "better beyond noise than `zeros`: -2.700" in text and "-3.000" in text
    assert "90% of the warmup's gain (95% interval 90% to 90%, over 3 seeds)" in text


def test_a_share_needs_a_plain_start_with_as_many_rates_and_a_warmup_that_gains(tmp_path):
    entries = [
        make_entry(v0, w, rate, seed)
        for seed in (1, 2, 3)
        for v0, w, rates in (
            ("zeros", "none", (1e-3,)),
            ("zeros", "200", (1e-3, 2e-3)),
            ("data_driven 1", "none", (1e-3, 2e-3)),
        )
        for rate in rates
    ]
    write_plan(tmp_path / "fewer", entries)
    for entry in entries:
        final = {("zeros", "none"): 5.0, ("zeros", "200"): 2.0}.get((entry["v0"], entry["warmup"]), 2.3)
        write_run(tmp_path / "fewer", entry, final + SPREAD[entry["seed"]] + (entry["learning_rate"] == 2e-3))
    text = get_point(conclude(tmp_path / "fewer"), "Against a plain start")
    assert "%" not in text.replace("95% interval", "") and "run at fewer learning rates" in text
    assert "gain" not in get_point(conclude_on(tmp_path / "harm", 2.0, 2.5, 2.3), "Against a plain start")


# ------------------------------------------------------------------------------------------- the plain start is in every verdict


def test_without_a_warmup_a_harmful_v0_is_not_advised(tmp_path):
    conclusion = conclude_on(tmp_path, 3.0, None, 4.0)
    assert (
        conclusion.verdict == "v0_harms" and "1.000 above `zeros`, the plain start, beyond noise" in conclusion.headline
    )
    assert get_point(conclusion, "Use").startswith("`zeros`")


def test_two_seeds_that_put_the_plain_start_first_are_heard(tmp_path):
    conclusion = conclude_on(tmp_path, 3.0, 4.0, 3.5, seeds=(1, 2))
    assert conclusion.verdict == "plain_wins" and get_point(conclusion, "Use").startswith("`zeros`")


def test_a_winner_over_the_warmup_is_not_advised_where_a_noisy_plain_start_has_the_lower_mean(tmp_path):
    plain = {1: 2.0, 2: 3.2, 3: 3.9}

    def outcome(v0, warmup, rate, seed):
        return plain[seed] if (v0, warmup) == ("zeros", "none") else (3.3 if v0 != "zeros" else 3.6) + NOISE[seed]

    conclusion = conclude(write_grid(tmp_path, outcome))
    assert (
        conclusion.verdict == "undecided"
        and "The plain start, `zeros`, ends 0.267 below v0, within noise" in conclusion.headline
    )
    assert get_point(conclusion, "Use").startswith("Nothing yet. `zeros`")


@pytest.mark.parametrize("v0", [1.5, 2.3])
@pytest.mark.parametrize("warmup", [1.8, 5.2])
@pytest.mark.parametrize("plain", [1.6, 2.1, 5.0])
def test_what_is_advised_never_has_a_worse_mean_than_the_plain_start(tmp_path, plain, warmup, v0):
    conclusion = conclude_on(tmp_path, plain, warmup, v0)
    means = {"zeros": plain, "warmup 200": warmup, "data_driven 10": v0}
    advised = get_point(conclusion, "Use").split("`")[1]
    assert means[advised] <= plain + 0.01 and "plain start, `zeros`" in conclusion.headline


# ------------------------------------------------------------------------------------------------- more of it may be better


def test_an_accuracy_is_maximised(tmp_path):
    def outcome(v0, warmup, rate, seed):
        return {("zeros", "none"): 0.7, ("zeros", "200"): 0.8}.get((v0, warmup), 0.9) + NOISE[seed]

    folder = write_grid(tmp_path, outcome, metric="eval_accuracy", greater_is_better=True)
    for path in folder.glob("runs/*/output/*.json*"):
        path.write_text(path.read_text().replace("eval_loss", "eval_accuracy"))
    conclusion = conclude(folder)
    assert conclusion.verdict == "v0_wins" and "ends 0.100 above `warmup 200`" in conclusion.headline
    assert get_point(conclusion, "Use").startswith("`data_driven 10`")


# --------------------------------------------------------------------------------------------------- choices and their price


def conclude_on_trials(folder, finals, seeds, rates=(1e-3,)):
    """Arms by (v0, warmup) with a final loss by seed; those without a seed are not planned there."""
    entries = [
        make_entry(*arm, rate, seed) for seed in seeds for arm in finals for rate in rates if seed in finals[arm]
    ]
    write_plan(folder, entries)
    for entry in entries:
        write_run(folder, entry, finals[entry["v0"], entry["warmup"]][entry["seed"]])
    return conclude(folder)


def test_a_choice_is_judged_on_seeds_that_had_no_part_in_it(tmp_path):
    """Nine settings of pure noise: the best of them looks better than the warmup on every seed's own choice, and is not."""
    draws = random.Random(3)
    finals = {(f"random {i + 1}", "none"): {s: 3.0 + draws.gauss(0, 0.3) for s in (1, 2, 3, 4)} for i in range(9)}
    finals |= {("zeros", "200"): dict.fromkeys((1, 2, 3, 4), 2.9), ("zeros", "none"): dict.fromkeys((1, 2, 3, 4), 5.0)}
    conclusion = conclude_on_trials(tmp_path, finals, (1, 2, 3, 4))
    # For every seed, by hand: the setting that is best on the three others.
    v0s = [by_seed for (v0, _), by_seed in finals.items() if v0 != "zeros"]
    expected = 0.0
    for seed in (1, 2, 3, 4):
        chosen = min(v0s, key=lambda by_seed: sum(loss for s, loss in by_seed.items() if s != seed))
        expected += (chosen[seed] - 2.9) / 4
    assert f"each seed judges a choice made without it: {expected:+.3f}" in get_point(conclusion, "Beyond noise?")
    assert "chosen from 9 trials of v0 settings" in conclusion.headline


def test_a_seed_on_which_settings_were_screened_judges_nothing(tmp_path):
    finals = {(f"random {i}", "none"): {1: 3.0 + i / 10} for i in range(1, 6)}
    finals["random 1", "none"] |= {2: 3.0, 3: 3.02}
    finals |= {("zeros", "200"): {1: 2.5, 2: 2.6, 3: 2.61}}
    conclusion = conclude_on_trials(tmp_path, finals, (1, 2, 3))
    text = get_point(conclusion, "Beyond noise?")
    assert "+0.405" in text and "over 2 seeds (not seed 1, where more settings were tried than on the others)" in text
    assert "+0.470" in text  # of these two arms over all three seeds
    finals["random 1", "none"].pop(3), finals["random 1", "none"].pop(2)
    conclusion = conclude_on_trials(tmp_path / "one", finals, (1,))
    assert conclusion.verdict == "too_few_seeds"


def test_an_arm_is_judged_at_its_best_rate_also_where_that_has_fewer_seeds(tmp_path):
    entries = [make_entry("zeros", w, rate, s) for w in ("none", "200") for rate in (1e-3, 2e-3) for s in (1, 2, 3)]
    entries += [make_entry("data_driven 10", "none", rate, s) for rate in (1e-3, 2e-3) for s in (1, 2, 3)]
    entries = [e for e in entries if (e["arm"], e["learning_rate"]) != ("zeros", 1e-3) or e["seed"] == 1]
    write_plan(tmp_path, entries)
    for entry in entries:
        final = {"zeros": 5.4, "warmup 200": 2.0}.get(entry["arm"], 2.3) - 0.6 * (entry["learning_rate"] == 1e-3)
        write_run(tmp_path, entry, final + SPREAD[entry["seed"]])
    text = get_point(conclude(tmp_path), "Mind")
    assert "`zeros` is lower at 0.001 (4.800, 1 seed) than at 0.002 (5.400 ± 0.020, 3 seeds), on fewer seeds" in text


def test_a_best_rate_at_the_edge_is_said_with_the_rate_to_add(tmp_path):
    falling = {1e-3: 0.6, 2e-3: 0.3, 4e-3: 0.0}
    inside = {1e-3: 0.6, 2e-3: 0.0, 4e-3: 0.3}
    v0, warmup, plain = (lambda r: 2.0 + falling[r]), (lambda r: 2.5 + inside[r]), (lambda r: 5.0 + inside[r])
    conclusion = conclude_on(tmp_path / "edge", plain, warmup, v0, rates=tuple(falling))
    assert conclusion.headline.startswith("So far: v0 beats the best warmup here")
    assert "`data_driven 10`, 0.004 (add 0.008) is at the edge" in get_point(conclusion, "Mind")
    conclusion = conclude_on(tmp_path / "inside", plain, warmup, lambda r: 2.0 + inside[r], rates=tuple(falling))
    assert conclusion.headline.startswith("v0 beats") and "edge" not in str(conclusion.points)


def test_a_diverged_arm_is_said_to_have_and_has_no_difference(tmp_path):
    conclusion = conclude_on(tmp_path, 5.0, 2.0, "diverged")
    assert "ending at 2.0" in get_point(conclusion, "Use")
    finals = {
        ("zeros", "200"): 2.0,
        ("zeros", "none"): 5.0,
        ("data_driven 10", "none"): 2.1,
        ("random 100", "none"): "diverged",
    }
    folder = write_grid(tmp_path / "default", lambda v0, w, r, s: finals[v0, w], arms=list(finals))
    assert "`random 100` diverged." in get_point(conclude(folder), "Tuning")


@pytest.mark.parametrize(
    ("slope", "words"),
    [(0.1, "v0 is the more robust one, beyond noise"), (0.9, "the warmup is the more robust one, beyond noise")],
)
def test_learning_rate_sensitivities_are_compared(tmp_path, slope, words):
    def bowl(depth):
        return lambda rate: 2.0 + depth * abs(rate / 1e-3 - 2.0)

    conclusion = conclude_on(tmp_path, 5.0, bowl(0.5), bowl(slope), rates=(1e-3, 2e-3, 3e-3))
    text = get_point(conclusion, "Learning rates")
    # depth * (1 + 0 + 1) / 3
    assert words in text and f"`warmup 200` {1.0 / 3:.3f}" in text and f"`data_driven 10` {2 * slope / 3:.3f}" in text
    assert conclusion.verdict == "no_difference"
    assert get_point(conclusion, "Use").startswith("`warmup 200`" if slope > 0.5 else "`data_driven 10`")


def test_one_learning_rate_says_nothing_of_robustness(tmp_path):
    assert "not known" in get_point(conclude_on(tmp_path, 5.0, 2.0, 2.0), "Learning rates")


def test_what_needs_no_tuning_is_named(tmp_path):
    finals = {
        ("zeros", "200"): 2.0,
        ("zeros", "untuned_linear"): 2.2,
        ("data_driven 1", "none"): 2.3,
        ("data_driven 10", "none"): 2.1,
    }
    folder = write_grid(tmp_path, lambda v0, w, r, s: finals[v0, w] + SPREAD[s], arms=list(finals))
    text = get_point(conclude(folder), "Tuning")
    untuned = text[text.index("With nothing to choose") :]
    assert (
        "`warmup untuned_linear` 2.200" in untuned
        and "`data_driven 1` 2.300" in untuned
        and "data_driven 10" not in untuned
    )


def write_lengths(folder, lengths: dict[int, int]) -> None:
    """Write what the measured runs of these seeds have measured."""
    for path in (folder / "runs").glob("*measured*"):
        seed = int(path.name.split("seed")[1].split("_")[0])
        report = {"strategy": "zeros", "length": {"d50": 1e-3, "x": 2.0, "steps": lengths[seed], "seconds": 1.5}}
        (path / "output" / "v0_init.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ({1: 250, 2: 260, 3: 240}, "240 to 260 steps"),
        ({1: 250, 2: 250, 3: 250}, "250 steps"),
        ({1: 0, 2: 0, 3: 0}, "no steps"),
    ],
)
def test_the_measured_length_stands_beside_the_tuned_one(tmp_path, lengths, words):
    finals = {
        ("zeros", "none"): 3.0,
        ("zeros", "100"): 2.2,
        ("zeros", "300"): 2.0,
        ("zeros", "untuned_linear"): 1.9,
        ("zeros", "measured"): 2.1,
    }
    folder = write_grid(tmp_path, lambda v0, w, r, s: finals[v0, w] + SPREAD[s], arms=list(finals))
    write_lengths(folder, lengths)
    text = get_point(conclude(folder), "Measured length")
    assert text.startswith(f"`warmup measured` held back for {words} and ends at 2.100")
    assert "the best of 3 lengths tried, `warmup 300`, at 2.000" in text and "(+0.100, 95% interval" in text
    runs = {run.seed: run for run in read_comparison(folder).runs if run.warmup == "measured"}
    assert [(runs[s].held_back, runs[s].v0_seconds, runs[s].v0_samples) for s in (1, 2, 3)] == [
        (lengths[s], 1.5, 0) for s in (1, 2, 3)
    ]


def test_v0_with_a_warmup_is_advised_where_it_is_better(tmp_path):
    finals = {
        ("zeros", "200"): 2.0,
        ("data_driven 1", "none"): 2.3,
        ("data_driven 1", "200"): 1.8,
        ("zeros", "none"): 5.0,
    }
    folder = write_grid(
        tmp_path, lambda v0, w, r, s: finals[v0, w] + SPREAD[s] + NOISE[s] * (v0 != "zeros"), arms=list(finals)
    )
    conclusion = conclude(folder)
    assert conclusion.verdict == "warmup_wins" and get_point(conclusion, "Use").startswith(
        "`data_driven 1 + warmup 200`"
    )
    assert "best mean of all is that of `data_driven 1 + warmup 200`" in get_point(conclusion, "Other arms")


def test_what_to_mind_is_said(tmp_path):
    conclusion = conclude_on(tmp_path / "pocket", "diverged", 2.0, 2.0, pocket=True)
    text = get_point(conclusion, "Mind")
    assert "Pocket scale" in text and "validation loss before the first step" in text and "Preliminary" not in text
    text = get_point(conclude_on(tmp_path / "partial", "running", 2.0, 2.0), "Mind")
    assert "Preliminary: 6 of 9 runs" in text
    folder = write_grid(tmp_path / "unlike", lambda v0, w, r, s: 2.0 + SPREAD[s])
    next(folder.glob("runs/zeros*seed2/output/fingerprint.json")).write_text(
        '{"initial_weights": "x", "batches": [], "rng": "y"}'
    )
    assert "seed 2 did not begin alike" in get_point(conclude(folder), "Mind")
