"""What a checkpoint's record says of the run that is resumed from it."""

from dataclasses import replace

from ..errors import InputError
from ..records.report import DECAY_FILE, read_decay_state
from ..settings import AUTO, V0Plan

IN_BOTH = ("decay", "decay_steps", "scale", "estimator", "include_bias_and_norm", "seed")  # a record and a plan


def describe_under_way(plan: V0Plan, estimation_steps: int) -> dict:
    """Say in a record what is under way before v0 stands; `read_plan` reads it back."""
    described = {name: getattr(plan, name) for name in IN_BOTH}
    return {"strategy": plan.init, "estimation_steps": estimation_steps, "is_written": False} | described


def read_plan(stored: dict) -> V0Plan:
    """Read from a record the plan that the run was begun with."""
    plan = V0Plan(init=stored["strategy"], **{name: stored.get(name) for name in IN_BOTH})
    return plan if plan.decay_steps is None else replace(plan, scale=None)


def read_hook_state(folder: str, stored: dict, step: int) -> dict | None:
    """Read what the hook needs to go on from a checkpoint at `step` (`V0Hook.load_state_dict`); None if its work is done.

    Raises:
        InputError: v0 was decaying linearly, and what the decay keeps is not there or damaged.
    """
    if stored.get("estimator") == "per_sample":
        return None
    first, held = stored.get("estimation_steps") or 1, None
    if stored.get("decay") == "linear":
        if step >= stored["decay_steps"]:
            return None
        held = read_decay_state(folder)
        if held is None and step > first:
            raise InputError(
                f"the checkpoint {folder} was saved while v0 decayed and lacks {DECAY_FILE}, without which its second moment cannot be "
                "gone on with: resume from another checkpoint"
            )
    numbers = {"decay_steps": stored.get("decay_steps"), "estimation_steps": first, "held": {}}
    return (held or numbers) | {"num_steps": step}


def find_differences(stored: dict, plan: V0Plan, seed: int) -> list[str]:
    """Name the settings in which a plan differs from a stored record, as 'name: stored -> now'."""
    now = {"strategy": plan.init, "decay": plan.decay, "estimator": plan.estimator}
    if plan.decay_steps not in (None, AUTO):
        now["decay_steps"] = plan.decay_steps
    if plan.decay_steps is None and plan.scale is not None:
        now["scale"] = plan.scale
    if plan.estimation_steps is not None:
        now["estimation_steps"] = plan.estimation_steps
    if plan.estimator == "per_sample":
        now["num_samples_requested"] = plan.num_samples
        if plan.stats_batch_size is not None:
            now["stats_batch_size"] = plan.stats_batch_size
    now |= {"include_bias_and_norm": plan.include_bias_and_norm, "seed": seed}
    return [f"{name}: {stored.get(name)} -> {value}" for name, value in now.items() if stored.get(name) != value]
