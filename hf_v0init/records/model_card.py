"""What the Hub is told about v0: tags in the card's metadata, and sections in its text.

Pure functions on text and on the report that `trainer.get_v0_report()` returns and `v0_init.json` stores; the
Trainer calls them on the card that it has written. Every function may be applied again to its own result.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import RepoCard
from transformers import modelcard

from ..method.length import WarmupLength

TAG, PAPER_TAG = "hf_v0init", "arxiv:2412.02153"  # the second for runs with a v0 alone
SECTION_TITLE = "Start of Adam's second moment (v0)"
SECTION = "hf_v0init"  # names in the comments around what is ours
RESULTS = "hf_v0init results"

_PAPER = "[arXiv:2412.02153](https://arxiv.org/abs/2412.02153)"
_ORIGINS = {
    "data_driven": f"the mean square of the gradients ({_PAPER})",
    "random": f"scaled chi-squared draws over the sum of each tensor's fans ({_PAPER})",
    "first_gradient": "the square of the first gradient (GI-Adam, Kalra & Barkeshli, NeurIPS 2024)",
}
# The Trainer writes this of a model without a name, which is what a model trained from scratch is.
_NAMELESS_ORIGIN = "This model is a fine-tuned version of [](https://huggingface.co/) on "
_SCRATCH_ORIGIN = "This model was trained from scratch on "
_FLAGS = {  # flag -> key of the report
    "v0_init": "strategy",
    "v0_decay": "decay",
    "v0_decay_steps": "decay_steps",
    "v0_scale": "scale",
    "v0_estimator": "estimator",
    "v0_estimation_steps": "estimation_steps",
    "v0_num_samples": "num_samples_requested",
    "v0_stats_batch_size": "stats_batch_size",
    "v0_seed": "seed",
    "v0_include_bias_and_norm": "include_bias_and_norm",
}


# ---- the section on v0 -----------------------------------------------------------------------------------------------


def add_v0_section(card_text: str, report: Mapping[str, Any] | None, task: str | None = None) -> str:
    """Add the tags of this package, the task and the section on v0 to a model card.

    The section replaces an earlier one where there is one; else it goes before "## Training procedure", or to the end. Tags keep
    their order and are listed once. The line by which the Trainer calls a nameless model "a fine-tuned version of" nothing becomes
    "trained from scratch". Other metadata and text stay as they are.

    Args:
        card_text: the card, YAML metadata between two `---` lines first (may be missing).
        report: as for `compose_v0_section`.
        task: the Hub's identifier, e.g. "translation", for a card that names none.

    Returns:
        The new card.
    """
    card = RepoCard(card_text)
    tags = card.data.get("tags") or []
    card.data["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *list_tags(report)]))
    if task is not None and card.data.get("pipeline_tag") is None:
        card.data["pipeline_tag"] = task
    text = card.text.replace(_NAMELESS_ORIGIN, _SCRATCH_ORIGIN)
    card.text = _put_section(text, compose_v0_section(report), SECTION)
    return str(card)


def infer_task(model_class_name: str) -> str | None:
    """Return the Hub's task identifier of a transformers model class, e.g. "text-generation"; None for one without a head of its own."""
    for task, mapping in modelcard.TASK_MAPPING.items():
        for names in mapping.values():
            if model_class_name in ([names] if isinstance(names, str) else names):
                return task
    return None


def list_tags(report: Mapping[str, Any] | None) -> list[str]:
    """List the tags of a run: the package's, and the paper's where there was a v0."""
    return [TAG] if _read_strategy(report) == "zeros" else [TAG, PAPER_TAG]


def compose_v0_section(report: Mapping[str, Any] | None) -> str:
    """Compose the card's section on v0: what the run did, and how to reproduce it.

    Args:
        report: what `trainer.get_v0_report()` returned or `v0_init.json` holds. Missing keys and None are
            left out of the text.

    Returns:
        Markdown without a trailing newline. One line (beside the heading) for None and for strategy `zeros`.
    """
    strategy, heading = _read_strategy(report), f"## {SECTION_TITLE}"
    if report is None or strategy == "zeros":
        warmup = _describe_measured_warmup(report or {})
        return f"{heading}\n\nAdam's second moment started at zero (`--v0_init zeros`), as in torch.{warmup}"
    opening = "`hf_v0init` started Adam's second moment at a positive v0 instead of zero"
    if report.get("decay") == "linear":
        opening = (
            "In place of a learning-rate warmup, `hf_v0init` gave Adam's second moment a v0 that decays so that the step grows linearly "
            f"over {_format(report.get('decay_steps'))} steps"
        )
    parts = [heading, f"{opening}: {_ORIGINS[strategy]}."]
    parts += ["### What the run did", "\n".join(f"- {fact}" for fact in _list_facts(report))]
    if report.get("multiplier"):
        rows = [(_format(int(t)), _format(value)) for t, value in report["multiplier"].items()]
        parts += [
            "Effective learning-rate factor at optimizer step t, for gradients that keep their size:",
            _compose_table(("t", "factor"), rows),
        ]
    parts += [
        "### How to reproduce it",
        "Add these flags to a training command that takes the arguments of `hf_v0init`; the other settings "
        "are the training hyperparameters of this card.",
        f"```bash\n{compose_flags(report)}\n```",
        "Mean, minimum and maximum of v0 per parameter, and versions: [`v0_init.json`](./v0_init.json).",
    ]
    return "\n\n".join(parts)


def compose_flags(report: Mapping[str, Any]) -> str:
    """Compose the command-line flags that ask for this run's v0 again: one line, exact numbers."""
    if _read_strategy(report) == "zeros":
        return "--v0_init zeros"
    left_out = set() if report["strategy"] == "data_driven" else {"v0_estimator", "v0_estimation_steps"}
    if report["strategy"] != "data_driven" or report.get("estimator") != "per_sample":
        left_out |= {"v0_num_samples", "v0_stats_batch_size"}
    if report.get("decay_steps") is not None:  # the size of v0 follows from it
        left_out.add("v0_scale")
    flags = {flag: report.get(key) for flag, key in _FLAGS.items() if flag not in left_out}
    return " ".join(f"--{flag} {_format_exact(value)}" for flag, value in flags.items() if value is not None)


def _read_strategy(report: Mapping[str, Any] | None) -> str:
    return (report or {}).get("strategy") or "zeros"


def _list_facts(report: Mapping[str, Any]) -> Iterable[str]:
    if report.get("length"):
        yield f"Measured in the first step: {WarmupLength.from_dict(report['length']).describe('v0 decays over')}"
    if report.get("num_parameters_with_v0") is not None:
        yield (
            f"With v0: {_format(report['num_parameters_with_v0'])} tensors, {_format(report.get('num_elements_with_v0'))} elements; "
            f"without: {_format(report.get('num_parameters_without_v0'))} tensors"
        )
    if report.get("v0_mean") is not None:
        yield f"v0: mean {_format(report['v0_mean'])}, min {_format(report.get('v0_min'))}, max {_format(report.get('v0_max'))}"
    if report.get("measured_ratio") is not None:
        yield f"v0 over the squared gradients of a step: {_format(report['measured_ratio'])}"
    yield f"Optimizer: {report.get('optimizer')}, beta2 {report.get('beta2')}"


def _describe_measured_warmup(report: Mapping[str, Any]) -> str:
    if not report.get("length"):
        return ""
    length, begun = WarmupLength.from_dict(report["length"]), ""
    if report.get("warmup_steps"):
        steps = _format(report["warmup_steps"])
        begun = f" The learning-rate warmup of {steps} steps was measured (`--untuned_warmup trust_radius`)."
    return f"{begun} Measured in the first step: {length.describe('the schedule warms up over')}."


# ---- results ---------------------------------------------------------------------------------------------------------


def add_results_section(card_text: str, results: Mapping[str, Any]) -> str:
    """Add what evaluations measured to a model card's text.

    The section replaces an earlier one where there is one; else it goes before "## Training procedure", or to the end.
    Metadata and other text stay as they are.

    Args:
        card_text: the card, as for `add_v0_section`.
        results: the metrics as in `all_results.json`, "eval_..." of validation, "predict_..." or "test_..." of test. Others,
            and those that tell of speed, are left out.

    Returns:
        The new card; the card as it is, if there is nothing to add.
    """
    rows = list(_list_results(results))
    if not rows:
        return card_text
    card, table = RepoCard(card_text), _compose_table(("Data", "Metric", "Value"), rows)
    card.text = _put_section(card.text, f"## Results\n\n{table}", RESULTS)
    return str(card)


def _list_results(results: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    for prefix, data in (("eval_", "validation"), ("predict_", "test"), ("test_", "test")):
        for key, value in sorted(results.items()):
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and not name.endswith(("runtime", "per_second", "model_preparation_time")):
                shown = f"{value:.4f}" if isinstance(value, float) else str(value)
                yield data, name, f"`{shown}`" if isinstance(value, str) else shown


# ---- text ------------------------------------------------------------------------------------------------------------


def _put_section(text: str, section: str, name: str) -> str:
    """Return the card's text with the section in place of an earlier one, or before the training procedure, or at the end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = f"{begin}\n{section}\n{end}"
    earlier = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", text, flags=re.DOTALL)
    following = re.search(r"^## Training procedure\s*$", text, flags=re.MULTILINE)
    if earlier:
        return text[: earlier.start()] + block + text[earlier.end() :]
    if following:
        return f"{text[: following.start()]}{block}\n\n{text[following.start() :]}"
    return f"{text.rstrip()}\n\n{block}\n"


def _compose_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _format(value: Any) -> str:
    """Return "1,000" for 1000, three digits of other numbers, and "not known" for None."""
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _format_exact(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)
