"""The model card: what the section says, and what the functions leave alone."""

import pytest
import yaml
from conftest import make_sequences
from trainers import train
from transformers import HfArgumentParser

from hf_v0init import V0InitArguments
from hf_v0init.records.model_card import (
    PAPER_TAG,
    SECTION_TITLE,
    TAG,
    add_v0_section,
    compose_flags,
    compose_v0_section,
    infer_task,
    list_tags,
)

V0_TAGS = [TAG, PAPER_TAG]
BEGIN = "<!-- hf_v0init: begin -->"
REPORT = {
    "strategy": "data_driven",
    "scale": 1.0,
    "estimator": "per_sample",
    "num_samples_requested": 5000,
    "num_samples": 4800,
    "stats_batch_size": 8,
    "seed": 42,
    "include_bias_and_norm": False,
    "measured_ratio": 49.0,
    "decay": "beta2",
    "decay_steps": None,
    "optimizer": "AdamW",
    "beta2": 0.98,
    "seconds": 12.345,
    "num_batches": 600,
    "num_parameters_with_v0": 50,
    "num_parameters_without_v0": 98,
    "num_elements_with_v0": 1_234_567,
    "num_elements_without_v0": 8_910,
    "v0_mean": 1.234e-7,
    "v0_min": 0.0,
    "v0_max": 0.003,
    "multiplier": {"1": 0.14142, "10": 0.4277, "100": 0.9314},
    "versions": {"hf_v0init": "0.1.0", "torch": "2.13.0"},
    "parameters": {"wte.weight": {"mean": 1e-7, "min": 0.0, "max": 0.003, "shape": [64, 16]}},
}
CARD = """---
library_name: transformers
tags:
- generated_from_trainer
metrics:
- accuracy
model-index:
- name: tiny
  results: []
---

# tiny

## Training procedure

```text
## Not a heading of ours
```

### Framework versions
"""


def read_metadata(card_text: str) -> dict:
    return yaml.safe_load(card_text.split("---\n")[1])


def read_body(card_text: str) -> str:
    return card_text.split("---\n", 2)[2]


def test_section_states_what_the_run_did():
    lines = compose_v0_section(REPORT).splitlines()
    for line in (
        "- With v0: 50 tensors, 1,234,567 elements; without: 98 tensors",
        "- v0: mean 1.23e-07, min 0, max 0.003",
        "- v0 over the squared gradients of a step: 49",
        "- Optimizer: AdamW, beta2 0.98",
        "| t | factor |",
        "| 1 | 0.141 |",
        "| 10 | 0.428 |",
        "| 100 | 0.931 |",
        compose_flags(REPORT),
    ):
        assert lines.count(line) == 1, line


def test_flags_of_random_are_its_own_only():
    report = {"strategy": "random", "scale": 100.0, "seed": 3, "estimator": "per_sample", "estimation_steps": 4}
    assert compose_flags(report | {"num_samples_requested": 5}) == "--v0_init random --v0_scale 100 --v0_seed 3"
    minibatch = compose_flags(REPORT | {"estimator": "minibatch", "estimation_steps": 32})
    assert "--v0_estimation_steps 32 " in minibatch and "v0_num_samples" not in minibatch


@pytest.mark.parametrize("report", [None, {}, {"strategy": "zeros"}, REPORT | {"strategy": "zeros"}])
def test_section_without_v0_is_one_line_and_claims_no_paper(report):
    heading, blank, line = compose_v0_section(report).split("\n")
    assert heading == f"## {SECTION_TITLE}"
    assert blank == ""
    assert "--v0_init zeros" in line and compose_flags({"strategy": "zeros", "scale": 1.0}) == "--v0_init zeros"
    assert list_tags(report) == ["hf_v0init"]


@pytest.mark.parametrize("missing", sorted(REPORT.keys() - {"strategy"}))
def test_section_tolerates_a_missing_or_empty_key(missing):
    without = {key: value for key, value in REPORT.items() if key != missing}
    assert compose_v0_section(without) == compose_v0_section(REPORT | {missing: None})
    assert "--v0_init first_gradient\n" in compose_v0_section({"strategy": "first_gradient"})


@pytest.mark.parametrize(
    "arguments",
    [
        {"v0_init": "data_driven", "v0_scale": 0.1 + 0.2, "v0_num_samples": 7, "v0_stats_batch_size": 3, "v0_estimator": "per_sample"},
        {"v0_init": "data_driven", "v0_decay": "beta2", "v0_decay_steps": 400, "v0_estimation_steps": 4},
        {"v0_init": "random", "v0_decay_steps": 400},
        {"v0_init": "random", "v0_scale": 1e-12, "v0_include_bias_and_norm": True},
        {"v0_init": "first_gradient", "v0_scale": 10.0},
    ],
)  # fmt: skip
def test_flags_parse_back_to_the_arguments(arguments):
    wanted = V0InitArguments(v0_seed=11, **arguments).resolve(1000)
    report = vars(wanted) | {"strategy": wanted.init, "num_samples_requested": wanted.num_samples, "num_samples": 5}
    (parsed,) = HfArgumentParser(V0InitArguments).parse_args_into_dataclasses(compose_flags(report).split())
    assert parsed.resolve(1000) == wanted


@pytest.mark.parametrize("tags", ["tags: hf_v0init", "tags: [hf_v0init, a, a]", "license: mit", ""])
def test_tags_of_any_form_become_one_list_without_duplicates_and_other_metadata_stays(tags):
    after = read_metadata(add_v0_section(f"---\n{tags}\n---\n# x\n", REPORT))["tags"]
    assert set(after) >= set(V0_TAGS) and len(after) == len(set(after))
    before, after = read_metadata(CARD), read_metadata(add_v0_section(CARD, REPORT))
    assert after.pop("tags") == [*before.pop("tags"), *V0_TAGS]
    assert list(after.items()) == list(before.items())


def test_section_goes_before_training_procedure_or_to_the_end():
    body = read_body(add_v0_section(CARD, REPORT))
    begin, heading = body.index(BEGIN), body.index("## Training procedure")
    assert begin < body.index(f"## {SECTION_TITLE}") < heading
    assert body.replace(body[begin:heading], "") == read_body(CARD)
    text, block = add_v0_section("# x\n\nText about ## Training procedure.\n", REPORT).split(BEGIN)
    assert text.endswith("# x\n\nText about ## Training procedure.\n\n") and block.count(SECTION_TITLE) == 1


@pytest.mark.parametrize("report", [None, REPORT])
@pytest.mark.parametrize("card", [CARD, "# no metadata\n", "---\nlicense: mit\n---\n", ""])
def test_adding_the_section_again_changes_nothing(card, report):
    once = add_v0_section(card, report)
    assert add_v0_section(once, report) == once


def test_a_new_section_replaces_the_earlier_one_where_it_stands():
    first = add_v0_section(CARD, REPORT)
    again = add_v0_section(first, REPORT | {"seed": 43, "scale": 10.0})
    assert again.count(f"## {SECTION_TITLE}") == 1
    assert again == first.replace("--v0_scale 1 ", "--v0_scale 10 ").replace("--v0_seed 42", "--v0_seed 43")
    assert add_v0_section(again, REPORT) == first


def test_the_task_is_added_where_the_card_names_none():
    metadata = read_metadata(add_v0_section(CARD, REPORT, "translation"))
    assert metadata["pipeline_tag"] == "translation"
    named = CARD.replace("metrics:", "pipeline_tag: other\nmetrics:")
    assert read_metadata(add_v0_section(named, None, "translation"))["pipeline_tag"] == "other"
    assert infer_task("T5ForConditionalGeneration") == "text2text-generation" and infer_task("SomeModel") is None


def test_a_model_trained_from_scratch_is_not_called_fine_tuned():
    text = "This model is a fine-tuned version of [](https://huggingface.co/) on an unknown dataset."
    assert "This model was trained from scratch on an unknown dataset." in add_v0_section(text, None)
    named = text.replace("[](https://huggingface.co/)", "[a/b](https://huggingface.co/a/b)")
    assert named in add_v0_section(named, None)


def train_tiny_model(folder, **options):
    metrics = {"compute_metrics": lambda _: {"bleu": 12.5, "chrf": 34.5}, "eval_dataset": make_sequences(4)}
    return train(folder, kwargs=metrics, max_steps=2, eval_strategy="epoch", num_train_epochs=1, **options)


def test_card_written_without_pushing(tmp_path):
    trainer = train_tiny_model(
        tmp_path, data=make_sequences(8), v0_init="data_driven", v0_estimator="per_sample", v0_stats_batch_size=2
    )
    trainer.create_model_card(model_name="tiny", tags="mine")
    trainer.create_model_card(model_name="tiny", tags="mine")
    text = (tmp_path / "README.md").read_text()
    metadata = read_metadata(text)
    assert (metadata["pipeline_tag"], metadata["metrics"]) == ("text-generation", ["bleu"])
    assert sorted(metadata["tags"]) == sorted(["mine", "generated_from_trainer", *V0_TAGS])
    assert "- Bleu: 12.5\n- Chrf: 34.5" in text
    assert "This model was trained from scratch on" in text
    assert text.count(compose_v0_section(trainer.get_v0_report())) == 1
    assert text.index(SECTION_TITLE) < text.index("## Training procedure")


def test_card_of_a_named_task_without_v0(tmp_path):
    trainer = train_tiny_model(tmp_path, data=make_sequences(8))
    trainer.create_model_card(tasks="translation")
    text = (tmp_path / "README.md").read_text()
    assert trainer.get_v0_report() is None
    assert read_metadata(text)["pipeline_tag"] == "translation"
    assert text.count(compose_v0_section(None)) == 1
    assert TAG in read_metadata(text)["tags"] and PAPER_TAG not in read_metadata(text)["tags"]


def test_a_measured_length_of_another_version_is_told():
    length = {"steps": 40, "d50": 0.002, "learning_rate": 0.001, "x": 0.5, "is_capped": False}
    text = add_v0_section("# model\n", {"strategy": "zeros", "warmup_steps": 40, "length": length}, None)
    assert "trust radius d50 0.002, learning rate / d50 = 0.5: the schedule warms up over 40 steps" in text
