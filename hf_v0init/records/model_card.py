"""What the Hub is told about v0: tags, task and metrics in the card's metadata, and a section in its text.

Pure functions on text and on the report that `trainer.get_v0_report()` returns and `v0_init.json` stores; the
Trainer calls them on the card that it has written. Every function may be applied again to its own result.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import RepoCard
from transformers import modelcard

from ..errors import InputError

TAG, PAPER_TAG = "hf_v0init", "arxiv:2412.02153"  # the second for runs with a v0 alone

SECTION_TITLE = "Start of Adam's second moment (v0)"
SECTION_BEGIN = "<!-- hf_v0init: begin -->"
SECTION_END = "<!-- hf_v0init: end -->"
RESULTS_TITLE = "Results"
RESULTS_BEGIN = "<!-- hf_v0init results: begin -->"
RESULTS_END = "<!-- hf_v0init results: end -->"
FOLLOWING_HEADING = "## Training procedure"

_SAMPLES_TITLE = "### Samples"

# The Trainer knows the names of the metrics that the Hub lists, but not these.
FURTHER_METRICS = ("chrf", "perplexity")

_PAPER = "[arXiv:2412.02153](https://arxiv.org/abs/2412.02153)"
_ORIGINS = {
    "data_driven": f"the scaled mean square of the gradients ({_PAPER})",
    "random": f"scaled chi-squared draws over the sum of each tensor's fans ({_PAPER})",
    "first_gradient": "the scaled square of the first gradient (GI-Adam, Kalra & Barkeshli, NeurIPS 2024)",
}
# The Trainer writes this of a model without a name, which is what a model trained from scratch is.
_NAMELESS_ORIGIN = "This model is a fine-tuned version of [](https://huggingface.co/) on "
_SCRATCH_ORIGIN = "This model was trained from scratch on "


def list_tags(report: Mapping[str, Any] | None) -> list[str]:
    """List the tags of a run: the package's, and the paper's where there was a v0."""
    has_v0 = ((report or {}).get("strategy") or "zeros") != "zeros"
    return [TAG, PAPER_TAG] if has_v0 else [TAG]


def compose_v0_section(report: Mapping[str, Any] | None) -> str:
    """Compose the card's section on v0: settings, what the run did, how to reproduce it.

    Args:
        report: what `trainer.get_v0_report()` returned or `v0_init.json` holds. Missing keys and None are
            left out of the text.

    Returns:
        Markdown without a trailing newline. One line (beside the heading) for None and for strategy `zeros`.
    """
    strategy = (report or {}).get("strategy") or "zeros"
    if report is None or strategy == "zeros":
        warmup = _describe_measured_warmup(report or {})
        return f"## {SECTION_TITLE}\n\nAdam's second moment started at zero (`--v0_init zeros`), as in torch.{warmup}"
    origin = _ORIGINS.get(strategy)
    opening = "`hf_v0init` started Adam's second moment at a positive v0 instead of zero"
    if report.get("decay") == "linear":
        opening = (
            "In place of a learning-rate warmup, `hf_v0init` gave Adam's second moment a v0 that decays so that the step grows linearly "
            f"over {_format_count(report.get('decay_steps'))} steps"
        )
    parts = [
        f"## {SECTION_TITLE}",
        f"{opening}: {origin}." if origin else f"{opening}.",
        _compose_table(("Setting", "Value"), _list_settings(report)),
    ]
    facts = _list_facts(report)
    if facts:
        parts += ["### What the run did", "\n".join(f"- {fact}" for fact in facts)]
    if report.get("multiplier"):
        rows = [(_format_count(t), _format_short(value)) for t, value in report["multiplier"].items()]
        ratio = report.get("measured_ratio")
        size = "" if ratio is None else f" v0 was {_format_short(ratio)} times the squared gradients of a step."
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
    versions = report.get("versions")
    if versions:
        parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    parts.append("Mean, minimum and maximum of v0 per parameter: [`v0_init.json`](./v0_init.json).")
    return "\n\n".join(parts)


def compose_flags(report: Mapping[str, Any]) -> str:
    """Compose the command-line flags that ask for this run's v0 again: one line, exact numbers."""
    strategy = report.get("strategy") or "zeros"
    flags = [f"--v0_init {strategy}"]
    if strategy == "zeros":
        return flags[0]

    def add(flag: str, key: str) -> None:
        if report.get(key) is not None:
            flags.append(f"--{flag} {_format_exact(report[key])}")

    add("v0_decay", "decay")
    if report.get("decay_steps") is not None:  # the size of v0 follows from it
        add("v0_decay_steps", "decay_steps")
    else:
        add("v0_scale", "scale")
    if strategy == "data_driven":
        add("v0_estimator", "estimator")
        add("v0_estimation_steps", "estimation_steps")
        if report.get("estimator") == "per_sample":
            requested = "num_samples_requested"
            add("v0_num_samples", requested if report.get(requested) is not None else "num_samples")
            add("v0_stats_batch_size", "stats_batch_size")
    add("v0_seed", "seed")
    if report.get("include_bias_and_norm") is not None:
        flags.append(f"--v0_include_bias_and_norm {bool(report['include_bias_and_norm'])}")
    return " ".join(flags)


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
    card.data["tags"] = _merge_unique(card.data.get("tags"), list_tags(report))
    card.text = _put_section(card.text, compose_v0_section(report), SECTION_BEGIN, SECTION_END)
    return str(card)


def add_results_section(card_text: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, str]] = ()) -> str:
    """Add what evaluations measured to a model card, and samples of what the model does.

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
    rows = list(_list_results(results))
    card = _parse_card(card_text)
    if not samples:
        earlier = re.search(
            rf"{re.escape(_SAMPLES_TITLE)}\n.*?(?=\n{re.escape(RESULTS_END)})", card.text, flags=re.DOTALL
        )
        sample_part = earlier[0] if earlier else ""
    else:
        columns = tuple(samples[0])
        table = _compose_table(columns, [tuple(_escape_cell(row[name]) for name in columns) for row in samples])
        sample_part = f"{_SAMPLES_TITLE}\n\n{table}"
    if not (rows or sample_part):
        return card_text
    parts = [f"## {RESULTS_TITLE}"]
    if rows:
        parts.append(_compose_table(("Data", "Metric", "Value"), rows))
    if sample_part:
        parts.append(sample_part)
    card.text = _put_section(card.text, "\n\n".join(parts), RESULTS_BEGIN, RESULTS_END)
    return str(card)


def _list_results(results: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    for prefix, data in (("eval_", "validation"), ("predict_", "test"), ("test_", "test")):
        for key, value in sorted(results.items()):
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name.endswith(("runtime", "per_second", "model_preparation_time")):
                continue
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            yield data, name, f"`{shown}`" if isinstance(value, str) else shown


def _escape_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _put_section(text: str, section: str, begin: str, end: str) -> str:
    """Return the card's text with the section in place of an earlier one, or before the training procedure, or at the end."""
    block = f"{begin}\n{section}\n{end}"
    earlier = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", text, flags=re.DOTALL)
    following = re.search(rf"^{re.escape(FOLLOWING_HEADING)}\s*$", text, flags=re.MULTILINE)
    if earlier:
        return text[: earlier.start()] + block + text[earlier.end() :]
    if following:
        return f"{text[: following.start()]}{block}\n\n{text[following.start() :]}"
    return f"{text.rstrip()}\n\n{block}\n"


def add_task_and_metrics(card_text: str, task: str | Sequence[str] | None, metrics: Iterable[str] = ()) -> str:
    """Add the task (`pipeline_tag`) and the names of the metrics to a model card's metadata.

    A `pipeline_tag` that the card already has stays. The line by which the Trainer calls a nameless model "a
    fine-tuned version of" nothing becomes "trained from scratch".

    Args:
        card_text: the card, as for `add_v0_section`.
        task: the Hub's identifier, e.g. "translation" or "text-generation"; of several the first
            counts, since a card has one `pipeline_tag`; None adds none.
        metrics: the Hub's identifiers, e.g. "bleu".

    Returns:
        The new card.

    Raises:
        InputError: the card's metadata is not a YAML mapping.
    """
    card = _parse_card(card_text)
    if task and card.data.get("pipeline_tag") is None:
        card.data["pipeline_tag"] = task if isinstance(task, str) else task[0]
    names = _merge_unique(card.data.get("metrics"), metrics)
    if names:
        card.data["metrics"] = names
    card.text = card.text.replace(_NAMELESS_ORIGIN, _SCRATCH_ORIGIN)
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


def infer_metrics(log_history: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the Hub's identifiers of the metrics that evaluations logged (`eval_bleu` -> "bleu"), each once.

    Args:
        log_history: `trainer.state.log_history`.
    """
    known = {*modelcard.METRIC_TAGS, *FURTHER_METRICS}
    logged = (key.removeprefix("eval_") for entry in log_history for key in entry if key.startswith("eval_"))
    return _merge_unique(None, (name for name in logged if name in known))


def _list_settings(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    strategy = report["strategy"]
    rows = [("strategy", f"`{strategy}`")]

    def add(label: str, key: str, write: Callable[[Any], str]) -> None:
        if report.get(key) is not None:
            rows.append((label, write(report[key])))

    add("decay", "decay", "`{}`".format)
    add("decay steps", "decay_steps", _format_count)
    if report.get("decay") != "linear":
        add("scale", "scale", _format_exact)
    if strategy == "data_driven":
        add("estimator", "estimator", "`{}`".format)
        add("estimation steps", "estimation_steps", _format_count)
        if report.get("estimator") == "per_sample":
            add("samples", "num_samples", _format_count)
            add("samples per batch of the pass before training", "stats_batch_size", _format_count)
    add("seed", "seed", _format_exact)
    add("biases and norms", "include_bias_and_norm", lambda wanted: "get a v0" if wanted else "start at zero")
    add("optimizer", "optimizer", "`{}`".format)
    add("its beta2", "beta2", _format_exact)
    return rows


def _list_facts(report: Mapping[str, Any]) -> list[str]:
    facts = []
    length = report.get("length")
    if length:
        facts.append(_describe_length(length))
    if report.get("status"):
        facts.append(f"Status: {report['status']}")
    for unit in ("parameters", "elements"):
        with_v0, without_v0 = (report.get(f"num_{unit}_{having}_v0") for having in ("with", "without"))
        if with_v0 is not None:
            label = "Parameter tensors" if unit == "parameters" else "Elements"
            rest = "" if without_v0 is None else f"; without: {_format_count(without_v0)}"
            facts.append(f"{label} with v0: {_format_count(with_v0)}{rest}")
    if report.get("without_gradient"):
        facts.append(f"Tensors that had no gradient when v0 was written: {len(report['without_gradient'])}")
    values = [(name, report.get(f"v0_{name}")) for name in ("mean", "min", "max")]
    known = [f"{name} {_format_short(value)}" for name, value in values if value is not None]
    if known:
        facts.append(f"v0 over the elements that have one: {', '.join(known)}")
    if report.get("seconds") is not None:
        batches, processes = report.get("num_batches"), report.get("num_processes") or 1
        over = f", {_format_count(batches)} batches" if batches else ""
        on = f" on {processes} processes" if processes > 1 else ""
        facts.append(f"Time that measuring and writing took: {_format_short(report['seconds'])} s{over}{on}")
    return facts


def _describe_length(length: Mapping[str, Any]) -> str:
    """Say what was measured for the length of the warmup, and what followed."""
    if length.get("x") is None:
        return (
            f"The trust radius could not be measured ({length.get('reason')}): 2 / (1 - beta2) steps were taken, "
            f"{_format_count(length['steps'])}"
        )
    then = f"{_format_count(length['steps'])} steps" if length["steps"] else "no warmup needed"
    cut = ", cut to two thirds of the run" if length.get("is_capped") else ""
    return (
        f"Learning rate over the trust radius, measured in the first step: {_format_short(length['x'])} (d50 "
        f"{_format_short(length['d50'])}): {then}{cut}"
    )


def _describe_measured_warmup(report: Mapping[str, Any]) -> str:
    length = report.get("length")
    if not length:
        return ""
    begun = (
        f" The learning-rate warmup of {_format_count(report['warmup_steps'])} steps was measured (`--untuned_warmup trust_radius`)."
        if report.get("warmup_steps")
        else ""
    )
    return f"{begun} {_describe_length(length)}."


def _parse_card(card_text: str) -> RepoCard:
    # RepoCard rather than ModelCard: the latter parses the model-index and fails on, or drops, a partial one.
    try:
        return RepoCard(card_text)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model card metadata: {reason}; put a YAML mapping between the two '---' lines") from error


def _merge_unique(present: str | Iterable[str] | None, added: Iterable[str]) -> list[str]:
    listed = [present] if isinstance(present, str) else list(present or ())
    return list(dict.fromkeys([*listed, *added]))


def _compose_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _format_count(value: Any) -> str:
    """Return "1,000" for 1000 or "1000", and other things as they are."""
    try:
        return f"{int(value):,}"
    except (TypeError, ValueError):
        return str(value)


def _format_short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "not known"


def _format_exact(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)
