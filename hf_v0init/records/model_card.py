"""What the Hub is told about v0: tags, task and results in the card's metadata, and sections in its text.

Pure functions on text and on the report that `trainer.get_v0_report()` returns and `v0_init.json` stores; the
Trainer calls them on the card that it has written. Every function may be applied again to its own result.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from transformers import modelcard

from ..errors import InputError

TAG, PAPER_TAG = "hf_v0init", "arxiv:2412.02153"  # the second for runs with a v0 alone
SECTION_TITLE = "Start of Adam's second moment (v0)"
SECTION_BEGIN, SECTION_END = "<!-- hf_v0init: begin -->", "<!-- hf_v0init: end -->"
RESULTS_BEGIN, RESULTS_END = "<!-- hf_v0init results: begin -->", "<!-- hf_v0init results: end -->"
FOLLOWING_HEADING = "## Training procedure"
SAMPLES_HEADING = "### Samples"

FURTHER_METRICS = ("chrf", "perplexity")  # which the Hub lists, and the Trainer does not know
UNKNOWN = "unknown"  # a result needs the name of a dataset, and local files have none

_PAPER = "[arXiv:2412.02153](https://arxiv.org/abs/2412.02153)"
_ORIGINS = {
    "data_driven": f"the scaled mean square of the gradients ({_PAPER})",
    "random": f"scaled chi-squared draws over the sum of each tensor's fans ({_PAPER})",
    "first_gradient": "the scaled square of the first gradient (GI-Adam, Kalra & Barkeshli, NeurIPS 2024)",
}
# The Trainer writes this of a model without a name, which is what a model trained from scratch is.
_NAMELESS_ORIGIN = "This model is a fine-tuned version of [](https://huggingface.co/) on "
_SCRATCH_ORIGIN = "This model was trained from scratch on "


def _format_count(value: Any) -> str:
    """Return "1,000" for 1000 or "1000", and other things as they are."""
    try:
        return f"{int(value):,}"
    except (TypeError, ValueError):
        return str(value)


def _format_short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "not known"


def _format_exact(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


_SETTINGS = (  # label in the table, key of the report, how its value is written
    ("strategy", "strategy", "`{}`".format),
    ("decay", "decay", "`{}`".format),
    ("decay steps", "decay_steps", _format_count),
    ("scale", "scale", _format_exact),
    ("estimator", "estimator", "`{}`".format),
    ("estimation steps", "estimation_steps", _format_count),
    ("samples", "num_samples", _format_count),
    ("samples per batch of the pass before training", "stats_batch_size", _format_count),
    ("seed", "seed", _format_exact),
    ("biases and norms", "include_bias_and_norm", lambda wanted: "get a v0" if wanted else "start at zero"),
    ("optimizer", "optimizer", "`{}`".format),
    ("its beta2", "beta2", _format_exact),
)
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


def list_tags(report: Mapping[str, Any] | None) -> list[str]:
    """List the tags of a run: the package's, and the paper's where there was a v0."""
    return [TAG] if _read_strategy(report) == "zeros" else [TAG, PAPER_TAG]


def compose_v0_section(report: Mapping[str, Any] | None) -> str:
    """Compose the card's section on v0: settings, what the run did, how to reproduce it.

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
            f"over {_format_count(report.get('decay_steps'))} steps"
        )
    settings = _select_settings(report)
    rows = [(label, write(settings[key])) for label, key, write in _SETTINGS if key in settings]
    origin = f": {_ORIGINS[strategy]}" if strategy in _ORIGINS else ""
    parts = [heading, f"{opening}{origin}.", _compose_table(("Setting", "Value"), rows)]
    facts = list(_list_facts(report))
    if facts:
        parts += ["### What the run did", "\n".join(f"- {fact}" for fact in facts)]
    if report.get("multiplier"):
        ratio = report.get("measured_ratio")
        size = "" if ratio is None else f" v0 was {_format_short(ratio)} times the squared gradients of a step."
        rows = [(_format_count(t), _format_short(value)) for t, value in report["multiplier"].items()]
        parts += [
            f"Effective learning-rate factor at optimizer step t, for gradients that keep their size.{size}",
            _compose_table(("t", "factor"), rows),
        ]
    parts += [
        "### How to reproduce it",
        "Add these flags to a training command that takes the arguments of `hf_v0init`; the other settings "
        "are the training hyperparameters of this card.",
        f"```bash\n{compose_flags(report)}\n```",
    ]
    if report.get("versions"):
        parts.append("Versions: " + ", ".join(map(" ".join, report["versions"].items())) + ".")
    parts.append("Mean, minimum and maximum of v0 per parameter: [`v0_init.json`](./v0_init.json).")
    return "\n\n".join(parts)


def compose_flags(report: Mapping[str, Any]) -> str:
    """Compose the command-line flags that ask for this run's v0 again: one line, exact numbers."""
    settings = _select_settings(report)
    if "decay_steps" in settings:  # the size of v0 follows from it
        settings.pop("scale", None)
    return " ".join(f"--{flag} {_format_exact(settings[key])}" for flag, key in _FLAGS.items() if key in settings)


def add_v0_section(card_text: str, report: Mapping[str, Any] | None) -> str:
    """Add the tags of this package and the section on v0 to a model card.

    The section replaces an earlier one where there is one; else it goes before "## Training procedure", or to
    the end. Tags keep their order and are listed once. Other metadata and text stay as they are.

    Args:
        card_text: the card, YAML metadata between two `---` lines first (may be missing).
        report: as for `compose_v0_section`.

    Returns:
        The new card.

    Raises:
        InputError: the card's metadata is not a YAML mapping.
    """
    card = _parse_card(card_text)
    card.data.tags = _merge_unique(card.data.tags, list_tags(report))
    card.text = _put_section(card.text, compose_v0_section(report), SECTION_BEGIN, SECTION_END)
    return str(card)


def _read_strategy(report: Mapping[str, Any] | None) -> str:
    return (report or {}).get("strategy") or "zeros"


def _select_settings(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a report applies to its strategy, estimator and decay, without what is None."""
    per_sample = {"num_samples", "num_samples_requested", "stats_batch_size"}
    if _read_strategy(report) == "zeros":
        return {"strategy": "zeros"}
    left_out = {"scale"} if report.get("decay") == "linear" else set()
    if report["strategy"] != "data_driven":
        left_out |= per_sample | {"estimator", "estimation_steps"}
    elif report.get("estimator") != "per_sample":
        left_out |= per_sample
    elif report.get("num_samples_requested") is None:
        report = {**report, "num_samples_requested": report.get("num_samples")}
    return {key: value for key, value in report.items() if value is not None and key not in left_out}


def _list_facts(report: Mapping[str, Any]) -> Iterable[str]:
    if report.get("length"):
        yield _describe_length(report["length"])
    if report.get("status"):
        yield f"Status: {report['status']}"
    for label, unit in (("Parameter tensors", "parameters"), ("Elements", "elements")):
        with_v0, without_v0 = (report.get(f"num_{unit}_{having}_v0") for having in ("with", "without"))
        if with_v0 is not None:
            rest = "" if without_v0 is None else f"; without: {_format_count(without_v0)}"
            yield f"{label} with v0: {_format_count(with_v0)}{rest}"
    if report.get("without_gradient"):
        yield f"Tensors that had no gradient when v0 was written: {len(report['without_gradient'])}"
    values = {name: report.get(f"v0_{name}") for name in ("mean", "min", "max")}
    known = [f"{name} {_format_short(value)}" for name, value in values.items() if value is not None]
    if known:
        yield f"v0 over the elements that have one: {', '.join(known)}"
    if report.get("seconds") is not None:
        over = f", {_format_count(report['num_batches'])} batches" if report.get("num_batches") else ""
        on = f" on {report['num_processes']} processes" if (report.get("num_processes") or 1) > 1 else ""
        yield f"Time that measuring and writing took: {_format_short(report['seconds'])} s{over}{on}"


def _describe_length(length: Mapping[str, Any]) -> str:
    """Say what was measured for the length of the warmup, and what followed."""
    if length.get("x") is None:
        return (
            f"The trust radius could not be measured ({length.get('reason')}): a third of training was taken, "
            f"{_format_count(length['steps'])} steps"
        )
    cut = ", cut to two thirds of the run" if length.get("is_capped") else ""
    return (
        f"Learning rate over the trust radius, measured in the first step: {_format_short(length['x'])} (d50 "
        f"{_format_short(length['d50'])}): {_format_count(length['steps'])} steps{cut}"
    )


def _describe_measured_warmup(report: Mapping[str, Any]) -> str:
    if not report.get("length"):
        return ""
    begun = ""
    if report.get("warmup_steps"):
        steps = _format_count(report["warmup_steps"])
        begun = f" The learning-rate warmup of {steps} steps was measured (`--untuned_warmup trust_radius`)."
    return f"{begun} {_describe_length(report['length'])}."


# ---- task and results ------------------------------------------------------------------------------------------------


def add_results_section(card_text: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, str]] = ()) -> str:
    """Add what evaluations measured to a model card's text, and samples of what the model does.

    The section replaces an earlier one where there is one; else it goes before "## Training procedure", or to the end.
    Metadata and other text stay as they are.

    Args:
        card_text: the card, as for `add_v0_section`.
        results: the metrics as in `all_results.json`, "eval_..." of validation, "predict_..." or "test_..." of test. Others,
            and those that tell of speed, are left out.
        samples: rows of a table, by the names of its columns; without any, those of an earlier section stay.

    Returns:
        The new card; the card as it is, if there is nothing to add.

    Raises:
        InputError: the card's metadata is not a YAML mapping.
    """
    card, parts = _parse_card(card_text), ["## Results"]
    rows = list(_list_results(results))
    earlier = re.search(rf"{SAMPLES_HEADING}\n.*?(?=\n{re.escape(RESULTS_END)})", card.text, flags=re.DOTALL)
    if rows:
        parts.append(_compose_table(("Data", "Metric", "Value"), rows))
    if samples:
        cells = [tuple(" ".join(row[name].replace("|", "\\|").split()) for name in samples[0]) for row in samples]
        parts += [SAMPLES_HEADING, _compose_table(tuple(samples[0]), cells)]
    elif earlier:
        parts.append(earlier[0])
    if len(parts) == 1:
        return card_text
    card.text = _put_section(card.text, "\n\n".join(parts), RESULTS_BEGIN, RESULTS_END)
    return str(card)


def add_task_and_metrics(
    card_text: str, task: str | Sequence[str] | None, metrics: Mapping[str, float] | None = None
) -> str:
    """Add the task (`pipeline_tag`), the metrics and their values (`model-index`) to a model card's metadata.

    What the card has stays. The Trainer leaves out results without a dataset's name; here they get "unknown". The line by
    which the Trainer calls a nameless model "a fine-tuned version of" nothing becomes "trained from scratch".

    Args:
        card_text: the card, as for `add_v0_section`.
        task: the Hub's identifier, e.g. "translation" or "text-generation"; of several the first
            counts, since a card has one `pipeline_tag`; None adds none, and no values.
        metrics: the Hub's identifiers, e.g. "bleu", and the values of the last evaluation.

    Returns:
        The new card.

    Raises:
        InputError: the card's metadata is not a YAML mapping.
    """
    card = _parse_card(card_text)
    card.text = card.text.replace(_NAMELESS_ORIGIN, _SCRATCH_ORIGIN)
    data, task, metrics = card.data, [task] if isinstance(task, str) else list(task or ()), metrics or {}
    if task and data.pipeline_tag is None:
        data.pipeline_tag = task[0]
    data.metrics = _merge_unique(data.metrics, metrics) or None
    results = list(data.eval_results or ())
    missing = metrics.keys() - {result.metric_type for result in results}
    if data.pipeline_tag is not None and missing:
        datasets = [data.datasets] if isinstance(data.datasets, str) else data.datasets or [UNKNOWN]
        where = {"task_type": data.pipeline_tag, "dataset_type": datasets[0], "dataset_name": datasets[0]}
        if results:
            where = {key: value for key, value in vars(results[0]).items() if key.startswith(("task_", "dataset_"))}
        data.model_name = data.model_name or UNKNOWN
        data.eval_results = results + [
            EvalResult(metric_type=name, metric_value=value, **where)
            for name, value in metrics.items()
            if name in missing
        ]
    return str(card)


def infer_task(model_class_name: str) -> str | None:
    """Return the Hub's task identifier of a transformers model class, e.g. "text-generation", or None.

    Classes without a head of their own task (a bare encoder) have none. "text2text-generation" is left to the
    caller where it knows better (translation, summarization).
    """
    for task, mapping in modelcard.TASK_MAPPING.items():
        for names in mapping.values():
            if model_class_name in ([names] if isinstance(names, str) else names):
                return task
    return None


def infer_metrics(log_history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the last value of each metric that evaluations logged, by the Hub's identifier (`eval_bleu` -> "bleu").

    Args:
        log_history: `trainer.state.log_history`.
    """
    known = {*modelcard.METRIC_TAGS, *FURTHER_METRICS}
    logged = {key: value for entry in log_history for key, value in entry.items() if key.startswith("eval_")}
    return {name: value for key, value in logged.items() if (name := key.removeprefix("eval_")) in known}


def _list_results(results: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    for prefix, data in (("eval_", "validation"), ("predict_", "test"), ("test_", "test")):
        for key, value in sorted(results.items()):
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and not name.endswith(("runtime", "per_second", "model_preparation_time")):
                shown = f"{value:.4f}" if isinstance(value, float) else str(value)
                yield data, name, f"`{shown}`" if isinstance(value, str) else shown


# ---- cards -----------------------------------------------------------------------------------------------------------


def _parse_card(card_text: str) -> ModelCard:
    try:
        return ModelCard(card_text, ignore_metadata_errors=True)  # concerns a `model-index` that the Hub would refuse
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model card metadata: {reason}; put a YAML mapping between the two '---' lines") from error


def _put_section(text: str, section: str, begin: str, end: str) -> str:
    """Return the card's text with the section in place of an earlier one, or before the training procedure, or at the end."""
    block = f"{begin}\n{section}\n{end}"
    earlier = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", text, flags=re.DOTALL)
    following = re.search(rf"^{FOLLOWING_HEADING}\s*$", text, flags=re.MULTILINE)
    if earlier:
        return text[: earlier.start()] + block + text[earlier.end() :]
    if following:
        return f"{text[: following.start()]}{block}\n\n{text[following.start() :]}"
    return f"{text.rstrip()}\n\n{block}\n"


def _merge_unique(present: str | Iterable[str] | None, added: Iterable[str]) -> list[str]:
    listed = [present] if isinstance(present, str) else list(present or ())
    return list(dict.fromkeys([*listed, *added]))


def _compose_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
