"""Writes folders of runs as `hf-v0init compare` leaves them, with losses that are known."""

import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

START = 9.0
EVAL_STEPS = (0, 100, 200, 300, 400)
# A final loss; or 'diverged', 'failed', 'running', 'interrupted', 'pruned'; None: not started
Outcome = float | str | None
FAMILIES = {(False, False): "no warmup", (False, True): "warmup", (True, False): "v0", (True, True): "v0 + warmup"}


def make_entry(
    v0: str,
    warmup: str,
    rate: float,
    seed: int,
    stage: str = "confirm",
    optimizer: str = "adamw",
    other: dict | None = None,
) -> dict:
    parts = [v0] if v0 != "zeros" else []
    parts += [f"warmup {warmup}"] if warmup != "none" else []
    parts += [optimizer] if optimizer != "adamw" else []
    parts += [f"{name}={value}" for name, value in (other or {}).items()]
    setting = " + ".join(parts) or "no warmup"
    family = FAMILIES[v0 != "zeros", warmup != "none"] if optimizer == "adamw" else optimizer
    condition = ", ".join(f"{name}={value}" for name, value in (other or {}).items())
    name = f"{setting.replace(' + ', '+').replace(' ', '-')}_lr{rate:g}_seed{seed}"
    name += f"_{zlib.crc32(f'{stage} {name}'.encode()):08x}"
    arguments = {
        "learning_rate": rate,
        "seed": seed,
        "v0_init": v0.split()[0],
        "per_device_train_batch_size": 64,
        **(other or {}),
    }
    if warmup.isdigit():
        arguments["warmup_steps"] = int(warmup)
    return {"name": name, "stage": stage, "condition": condition, "family": family, "setting": setting, "v0": v0, "warmup": warmup} | {
        "optimizer": optimizer, "other": other or {}, "learning_rate": rate, "seed": seed, "arguments": arguments,
    }  # fmt: skip


def write_plan(folder: Path, entries: Sequence[dict], **changes) -> Path:
    plan = {"title": "A test", "small": False, "script": "run_translation", "launch": "python", "metric": "eval_loss"}
    plan |= {
        "greater_is_better": False,
        "confirm_seeds": [],
        "test_metrics": ["predict_bleu"],
        "prune": None,
    }
    plan |= {"margin": 0.01, "margin_is_relative": True, "arguments": {"max_steps": 400}, "runs": list(entries)}
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
    if state == "failed":
        return
    if losses is None:
        final = {"diverged": math.nan, "running": 5.0, "interrupted": 5.0, "pruned": 8.0}.get(outcome, outcome)
        losses = make_losses(5.0 if math.isnan(final) else final)
        if math.isnan(final):
            losses[-1] = math.nan
    extra, lines, clock = 3.0 if data_driven else 0.0, [], 0.0
    for step, loss in zip(EVAL_STEPS, losses, strict=False):
        seconds = step * 0.1 + (extra if step else 0.0)
        if step:
            lines.append({"loss": loss + 0.1, "step": step, "seconds": seconds + clock, "train_seconds": seconds})
        clock += 2.0
        lines.append({"eval_loss": loss, "step": step, "seconds": seconds + clock, "train_seconds": seconds})
    (output / "run_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if state == "finished":
        results = {"eval_loss": losses[-1], "predict_bleu": 40.0 - 5.0 * losses[-1] if bleu is None else bleu}
        (output / "all_results.json").write_text(json.dumps(results))
        (output / "trainer_state.json").write_text(
            json.dumps({"global_step": EVAL_STEPS[len(losses) - 1], "log_history": []})
        )


ARMS = (("zeros", "none"), ("zeros", "200"), ("data_driven 10", "none"))


def write_grid(
    folder: Path,
    outcome: Callable[[str, str, float, int], Outcome],
    *,
    settings: Sequence[tuple[str, str]] = ARMS,
    rates: Sequence[float] = (1e-3,),
    tune: Sequence[int] = (1,),
    confirm: Sequence[int] = (2, 3, 4),
    **plan,
) -> Path:
    """Write a plan of settings x rates on the `tune` seeds, and at the first rate on the `confirm` seeds, with `outcome(v0, warmup, rate, seed)`."""
    entries = [make_entry(v0, warmup, rate, seed, "tune") for seed in tune for v0, warmup in settings for rate in rates]
    entries += [make_entry(v0, warmup, rates[0], seed) for seed in confirm for v0, warmup in settings]
    write_plan(folder, entries, **plan)
    for entry in entries:
        write_run(folder, entry, outcome(entry["v0"], entry["warmup"], entry["learning_rate"], entry["seed"]))
    return folder
