"""Writes folders of runs as `hf-v0init compare` leaves them, with losses that are known."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

START = 9.0
EVAL_STEPS = (0, 100, 200, 300, 400)
Outcome = (
    float | str | None
)  # a final loss; or 'diverged', 'failed', 'running', 'interrupted', 'stopped_early'; None: not started


def make_entry(
    v0: str, warmup: str, rate: float, seed: int, optimizer: str = "adamw", other: dict | None = None
) -> dict:
    parts = [v0] if v0 != "zeros" else []
    parts += [f"warmup {warmup}"] if warmup != "none" else []
    parts += [optimizer] if optimizer != "adamw" else []
    parts += [f"{name}={value}" for name, value in (other or {}).items()]
    arm = " + ".join(parts) or "zeros"
    name = f"{arm.replace(' + ', '+').replace(' ', '-')}_lr{rate:g}_seed{seed}"
    arguments = {"learning_rate": rate, "seed": seed, "v0_init": v0.split()[0], "per_device_train_batch_size": 64} | (
        other or {}
    )
    return {"name": name, "arm": arm, "v0": v0, "warmup": warmup, "optimizer": optimizer, "other": other or {}} | {
        "learning_rate": rate, "seed": seed, "arguments": arguments,
    }  # fmt: skip


def write_plan(folder: Path, entries: Sequence[dict], **changes) -> Path:
    plan = {"title": "A test", "pocket": False, "script": "run_translation", "launch": "python", "metric": "eval_loss"}
    plan |= {"test_metrics": ["predict_bleu"], "published": [], "arguments": {"max_steps": 400}, "runs": list(entries)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan | changes))
    return folder


def make_losses(final: float, steps: Sequence[int] = EVAL_STEPS) -> list[float]:
    """From START down to `final`, half the way in every quarter of the run, and linear at its end."""
    last = steps[-1]
    shares = [(1.0 - 0.5 ** (4.0 * step / last)) / (1.0 - 0.5**4) for step in steps]
    return [START + (final - START) * share for share in shares]


def write_run(
    folder: Path,
    entry: dict,
    outcome: Outcome,
    *,
    losses: Sequence[float] | None = None,
    fingerprint: dict | None = None,
    bleu: float | None = None,
    step_seconds: float = 0.1,
    with_diagnostics: bool = False,
) -> None:
    """Write one run's folder. A data-driven v0 has a pass over 1,280 samples, which is 20 steps of 64, in 3 seconds."""
    if outcome is None:
        return
    run = folder / "runs" / entry["name"]
    output = run / "output"
    output.mkdir(parents=True)
    state = outcome if isinstance(outcome, str) else "finished"
    record = entry | {"state": state, "reason": None, "exit_status": 0, "seconds": 60.0}
    record |= {"versions": {"torch": "2.13.0"}, "hardware": {"cpu": "two cores"}}
    if state in ("diverged", "failed"):
        record |= {
            "reason": "a loss was nan" if state == "diverged" else "out of memory",
            "exit_status": int(state == "failed"),
        }
    (run / "record.json").write_text(json.dumps(record))
    data_driven = entry["v0"].startswith("data_driven")
    if entry["v0"] != "zeros":
        report = {"strategy": entry["v0"].split()[0], "scale": 1.0, "num_samples": 1280 if data_driven else 0}
        report |= {"effective_batch_size": 64.0, "seconds": 3.0 if data_driven else 0.5, "mean_loss": None}
        (output / "v0_init.json").write_text(json.dumps(report))
    seed = entry["seed"]
    usual = {"initial_weights": f"w{seed}", "batches": [f"b{seed}{i}" for i in range(4)], "rng": f"r{seed}"}
    (output / "fingerprint.json").write_text(json.dumps(fingerprint or usual))
    if with_diagnostics:
        (output / "v0_diagnostics.json").write_text(json.dumps(make_diagnostics(entry)))
    if state == "failed":
        return
    if losses is None:
        final = {"diverged": math.nan, "running": 5.0, "interrupted": 5.0, "stopped_early": 8.0}.get(outcome, outcome)
        losses = make_losses(5.0 if math.isnan(final) else final)
        if math.isnan(final):
            losses[-1] = math.nan
    steps = EVAL_STEPS[: len(losses)]
    extra = 3.0 if data_driven else 0.0
    lines, clock = [], 0.0
    for step, loss in zip(steps, losses, strict=True):
        seconds = step * step_seconds + (extra if step else 0.0)
        if step:
            lines.append({"loss": loss + 0.1, "step": step, "seconds": seconds + clock, "train_seconds": seconds})
        clock += 2.0
        lines.append({"eval_loss": loss, "step": step, "seconds": seconds + clock, "train_seconds": seconds})
    (output / "run_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if state == "finished":
        results = {"eval_loss": losses[-1], "predict_bleu": 40.0 - 5.0 * losses[-1] if bleu is None else bleu}
        (output / "all_results.json").write_text(json.dumps(results))
        (output / "trainer_state.json").write_text(json.dumps({"global_step": steps[-1], "log_history": []}))


def write_grid(
    folder: Path,
    outcome: Callable[[str, str, float, int], Outcome],
    *,
    arms: Sequence[tuple[str, str]] = (("zeros", "none"), ("zeros", "200"), ("data_driven 10", "none")),
    rates: Sequence[float] = (1e-3,),
    seeds: Sequence[int] = (1, 2, 3),
    with_diagnostics: bool = False,
    **plan,
) -> Path:
    """Write a plan of arms x rates x seeds, and the runs with `outcome(v0, warmup, rate, seed)`."""
    entries = [make_entry(v0, warmup, rate, seed) for seed in seeds for v0, warmup in arms for rate in rates]
    write_plan(folder, entries, **plan)
    for entry in entries:
        result = outcome(entry["v0"], entry["warmup"], entry["learning_rate"], entry["seed"])
        write_run(folder, entry, result, with_diagnostics=with_diagnostics)
    return folder


def make_diagnostics(entry: dict) -> dict:
    """What the callback would have written: updates that grow to lr under v0 and warmup, and m(t) of scale 1 at beta2 .98."""
    steps = list(range(1, 201))
    rate, has_v0 = entry["learning_rate"], entry["v0"] != "zeros"
    warmup = float(entry["warmup"]) if entry["warmup"].isdigit() else 0.0
    factor = [math.sqrt(1 - 0.98**t) if has_v0 else 1.0 for t in steps]
    rates = [rate * min(1.0, t / warmup) if warmup else rate for t in steps]
    relative = [0.5 * f + 0.5 / math.sqrt(t) * f for t, f in zip(steps, factor, strict=True)]
    norms = [1000.0 * r * lr for r, lr in zip(relative, rates, strict=True)]
    edges = [round(-14.0 + 0.2 * i, 6) for i in range(76)]
    histograms = {}
    for step in (1, 2, 10, 100):
        center = math.log10(relative[step - 1] * rates[step - 1])
        width = 0.1 if not has_v0 and step == 1 else 0.8
        weights = [math.exp(-(((edge + 0.1 - center) / width) ** 2)) for edge in edges[:-1]]
        shares = [0.98 * w / sum(weights) for w in weights]
        histograms[str(step)] = {"shares": shares, "zero": 0.02, "below": 0.0, "above": 0.0}
    looked = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 63, 79, 100, 126, 158, 200, 251, 316, 398, 400]
    start = 10.0 if has_v0 else 1.0
    drift = [1e-6 * start * 0.98**t * (t != 400) for t in looked]
    moment = {
        "step": looked,
        "mean": [1e-6 + d for d in drift],
        "drift": drift,
        "relative_drift": [d * 1e6 for d in drift],
    }
    multiplier = {}
    if has_v0:
        form = [math.sqrt(1 - 0.98**t) for t in looked]
        multiplier = {"step": looked, "unresolved": [0.0] * len(looked), "closed_form": form}
        multiplier |= {f"quantile_{q}": [f * k for f in form] for q, k in (("0.1", 0.6), ("0.5", 0.9), ("0.9", 1.0))}
        multiplier["closed_form_of_measured_ratio"] = [1 / math.sqrt(1 + 36 * 0.98**t / (1 - 0.98**t)) for t in looked]
    updates = {"step": steps, "learning_rate": rates, "norm": norms, "rms": norms, "rms_over_lr": relative}
    return {"settings": {}, "updates": updates, "histograms": {"log10_edges": edges, "steps": histograms}} | {
        "second_moment": moment, "multiplier": multiplier, "cost": {"seconds": 1.0, "share_of_time": 0.01},
    }  # fmt: skip
