"""The model card: what the section says, and what the functions leave alone."""

import pytest
import yaml

from hf_v0init.errors import InputError
from hf_v0init.records.model_card import (
    PAPER_TAG,
    SECTION_BEGIN,
    SECTION_TITLE,
    TAG,
    add_task_and_metrics,
    add_v0_section,
    compose_flags,
    compose_v0_section,
    infer_metrics,
    infer_task,
    list_tags,
)
from hf_v0init.settings import V0InitArguments

V0_TAGS = [TAG, PAPER_TAG]
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


def test_section_states_settings_and_what_the_run_did():
    lines = compose_v0_section(REPORT).splitlines()
    for line in (
        "| strategy | `data_driven` |",
        "| scale | 1 |",
        "| estimator | `per_sample` |",
        "| samples | 4,800 |",
        "| samples per batch of the pass before training | 8 |",
        "| seed | 42 |",
        "| biases and norms | start at zero |",
        "| optimizer | `AdamW` |",
        "| its beta2 | 0.98 |",
        "- Parameter tensors with v0: 50; without: 98",
        "- Elements with v0: 1,234,567; without: 8,910",
        "- v0 over the elements that have one: mean 1.23e-07, min 0, max 0.003",
        "- Time that measuring and writing took: 12.3 s, 600 batches",
        "| t | factor |",
        "| 1 | 0.141 |",
        "| 10 | 0.428 |",
        "| 100 | 0.931 |",
        "Versions: hf_v0init 0.1.0, torch 2.13.0.",
    ):
        assert lines.count(line) == 1, line
    assert "None" not in compose_v0_section(REPORT)


def test_section_of_random_has_its_own_settings_only():
    report = {"strategy": "random", "scale": 100.0, "seed": 3, "estimator": "per_sample", "estimation_steps": 4}
    section = compose_v0_section(report | {"multiplier": {}, "num_samples": 0})
    assert "| scale | 100 |" in section and "| seed | 3 |" in section
    assert not any(word in section for word in ("estimator", "measured", "samples", "m(t)"))


def test_section_of_steps_names_how_many_there_were():
    section = compose_v0_section(REPORT | {"estimator": "minibatch", "estimation_steps": 32})
    assert "| estimation steps | 32 |" in section and "--v0_estimation_steps 32 " in section
    assert "| samples" not in section and "v0_num_samples" not in section


def test_multipliers_come_with_the_size_that_they_follow_from():
    assert "v0 was 49 times the squared gradients of a step.\n\n| t | factor |" in compose_v0_section(REPORT)
    unknown = compose_v0_section(REPORT | {"measured_ratio": None})
    assert "gradients that keep their size.\n\n| t | factor |\n| --- | --- |\n| 1 | 0.141 |" in unknown


@pytest.mark.parametrize("report", [None, {}, {"strategy": "zeros"}, REPORT | {"strategy": "zeros"}])
def test_section_without_v0_is_one_line_and_claims_no_paper(report):
    heading, blank, line = compose_v0_section(report).split("\n")
    assert heading == f"## {SECTION_TITLE}"
    assert blank == ""
    assert line == "Adam's second moment started at zero (`--v0_init zeros`), as in torch."


@pytest.mark.parametrize("missing", sorted(REPORT.keys() - {"strategy"}))
def test_section_tolerates_a_missing_or_empty_key(missing):
    without = {key: value for key, value in REPORT.items() if key != missing}
    assert compose_v0_section(without) == compose_v0_section(REPORT | {missing: None})
    assert "None" not in compose_v0_section(without)


def test_section_of_a_bare_report():
    assert "--v0_init first_gradient\n" in compose_v0_section({"strategy": "first_gradient"})


@pytest.mark.parametrize(
    "arguments",
    [
        {
            "v0_init": "data_driven",
            "v0_scale": 0.1 + 0.2,
            "v0_num_samples": 7,
            "v0_stats_batch_size": 3,
            "v0_estimator": "per_sample",
            "v0_seed": 11,
        },
        {"v0_init": "data_driven", "v0_decay": "beta2", "v0_decay_steps": 400, "v0_estimation_steps": 4, "v0_seed": 0},
        {"v0_init": "random", "v0_decay_steps": 400, "v0_seed": 0},
        {
            "v0_init": "random",
            "v0_scale": 1e-12,
            "v0_include_bias_and_norm": True,
            "v0_seed": 1,
        },
        {"v0_init": "first_gradient", "v0_scale": 10.0, "v0_seed": 2},
    ],
)
def test_flags_parse_back_to_the_arguments(arguments):
    from transformers import HfArgumentParser

    wanted = V0InitArguments(**arguments).resolve(1000)
    report = {
        "strategy": wanted.init,
        "decay": wanted.decay,
        "decay_steps": wanted.decay_steps,
        "scale": wanted.scale,
        "estimator": wanted.estimator,
        "num_samples_requested": wanted.num_samples,
        "num_samples": 5,
        "stats_batch_size": wanted.stats_batch_size,
        "seed": wanted.seed,
        "include_bias_and_norm": wanted.include_bias_and_norm,
        "estimation_steps": wanted.estimation_steps,
    }
    (parsed,) = HfArgumentParser(V0InitArguments).parse_args_into_dataclasses(compose_flags(report).split())
    assert parsed.resolve(1000) == wanted


def test_flags_without_v0():
    assert compose_flags({"strategy": "zeros", "scale": 1.0, "seed": 2}) == "--v0_init zeros"


def test_tags_are_added_once_and_other_metadata_stays():
    before, after = read_metadata(CARD), read_metadata(add_v0_section(CARD, REPORT))
    assert after.pop("tags") == ["generated_from_trainer", *V0_TAGS]
    assert before.pop("tags") == ["generated_from_trainer"]
    assert list(after.items()) == list(before.items())


@pytest.mark.parametrize("tags", ["tags: hf_v0init", "tags: [hf_v0init, a, a]", "license: mit", ""])
def test_tags_of_any_form_become_one_list_without_duplicates(tags):
    after = read_metadata(add_v0_section(f"---\n{tags}\n---\n# x\n", REPORT))["tags"]
    assert set(after) >= set(V0_TAGS)
    assert len(after) == len(set(after))


def test_section_goes_before_training_procedure():
    after = add_v0_section(CARD, REPORT)
    body = read_body(after)
    begin, heading = body.index(SECTION_BEGIN), body.index("## Training procedure")
    assert begin < body.index(f"## {SECTION_TITLE}") < heading
    block = body[begin:heading]
    assert body.replace(block, "") == read_body(CARD)


def test_section_goes_to_the_end_where_there_is_no_training_procedure():
    after = add_v0_section("---\nlicense: mit\n---\n# x\n\nText about ## Training procedure.\n", REPORT)
    text, block = after.split(SECTION_BEGIN)
    assert text.endswith("# x\n\nText about ## Training procedure.\n\n")
    assert block.count(SECTION_TITLE) == 1


@pytest.mark.parametrize("report", [None, REPORT])
@pytest.mark.parametrize("card", [CARD, "# no metadata\n", "---\nlicense: mit\n---\n", ""])
def test_adding_the_section_again_changes_nothing(card, report):
    once = add_v0_section(card, report)
    assert add_v0_section(once, report) == once


def test_a_new_section_replaces_the_earlier_one_where_it_stands():
    first = add_v0_section(CARD, REPORT)
    again = add_v0_section(first, REPORT | {"seed": 43, "scale": 10.0})
    assert again.count(f"## {SECTION_TITLE}") == 1
    assert again == first.replace("| seed | 42 |", "| seed | 43 |").replace("| scale | 1 |", "| scale | 10 |").replace(
        "--v0_scale 1 ", "--v0_scale 10 "
    ).replace("--v0_seed 42", "--v0_seed 43")
    assert add_v0_section(again, REPORT) == first


def test_a_backslash_in_the_report_is_text():
    report = REPORT | {"versions": {"torch": r"\1\g<0>"}}
    assert add_v0_section(add_v0_section(CARD, REPORT), report).count(r"torch \1\g<0>") == 1


@pytest.mark.parametrize("metadata", ["- a\n- list", "tags: [unclosed", "just text"])
def test_metadata_that_is_no_mapping_is_an_input_error(metadata):
    with pytest.raises(InputError, match="model card metadata") as raised:
        add_v0_section(f"---\n{metadata}\n---\n# x\n", REPORT)
    assert "\n" not in str(raised.value)


def read_results(card_text: str) -> list[dict]:
    (entry,) = read_metadata(card_text)["model-index"]
    return [
        {"task": r["task"]["type"], "dataset": r["dataset"]["name"]} | {m["type"]: m["value"] for m in r["metrics"]}
        for r in entry["results"]
    ]


def test_task_metrics_and_their_values_are_added_once():
    once = add_task_and_metrics(CARD, "text-generation", {"perplexity": 30.0, "accuracy": 0.5})
    metadata = read_metadata(once)
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["metrics"] == ["accuracy", "perplexity"]
    assert read_results(once) == [
        {"task": "text-generation", "dataset": "unknown", "perplexity": 30.0, "accuracy": 0.5}
    ]
    assert add_task_and_metrics(once, "translation", {"perplexity": 30.0}) == once
    assert add_task_and_metrics(CARD, ["text-generation", "translation"], {"perplexity": 30.0, "accuracy": 0.5}) == once


def test_values_join_the_results_that_the_trainer_wrote():
    results = """  results:
  - task:
      name: Translation
      type: translation
    dataset:
      name: wmt
      type: wmt
      config: de-en
    metrics:
    - name: Bleu
      type: bleu
      value: 20.5
"""
    card = add_task_and_metrics(CARD.replace("  results: []\n", results), "translation", {"bleu": 20.5, "chrf": 40.0})
    assert read_results(card) == [{"task": "translation", "dataset": "wmt", "bleu": 20.5, "chrf": 40.0}]
    datasets = add_task_and_metrics(
        CARD.replace("model-index:", "datasets:\n- ptb\nmodel-index:"), "fill-mask", {"accuracy": 0.5}
    )
    assert read_results(datasets) == [{"task": "fill-mask", "dataset": "ptb", "accuracy": 0.5}]
    assert read_results(add_task_and_metrics(CARD, None, {"accuracy": 0.5})) == []  # a result needs a task


def test_no_task_and_no_metrics_change_nothing():
    assert read_metadata(add_task_and_metrics(CARD, None)) == read_metadata(CARD)
    assert read_body(add_task_and_metrics(CARD, None)) == read_body(CARD)


def test_a_model_trained_from_scratch_is_not_called_fine_tuned():
    text = "This model is a fine-tuned version of [](https://huggingface.co/) on an unknown dataset."
    assert "This model was trained from scratch on an unknown dataset." in add_task_and_metrics(text, None)
    named = text.replace("[](https://huggingface.co/)", "[a/b](https://huggingface.co/a/b)")
    assert named in add_task_and_metrics(named, None)


@pytest.mark.parametrize(
    ("model_class_name", "task"),
    [
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("T5ForConditionalGeneration", "text2text-generation"),
        ("SomeModelOfYours", None),
    ],
)
def test_infer_task(model_class_name, task):
    assert infer_task(model_class_name) == task


def test_infer_metrics_takes_the_known_names_of_evaluations():
    history = [
        {"loss": 3.0, "bleu": 1.0},
        {"eval_loss": 2.0, "eval_chrf": 40.0, "eval_bleu": 20.0, "eval_runtime": 1.0},
        {"eval_bleu": 21.0, "eval_perplexity": 30.0, "eval_bleu_signature": "x"},
        {"train_runtime": 3.0},
    ]
    assert infer_metrics(history) == {"chrf": 40.0, "bleu": 21.0, "perplexity": 30.0}


def test_tags_are_those_the_hub_is_searched_by():
    assert list_tags(REPORT) == ["hf_v0init", "arxiv:2412.02153"]
    assert list_tags(None) == list_tags({"strategy": "zeros"}) == ["hf_v0init"]


def train_tiny_model(folder, **arguments):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_v0init import V0InitTrainer, V0InitTrainingArguments

    token_ids = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row, "labels": row} for row in token_ids]
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    args = V0InitTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        eval_strategy="epoch",
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        **arguments,
    )
    trainer = V0InitTrainer(
        model=GPT2LMHeadModel(config),
        args=args,
        train_dataset=samples,
        eval_dataset=samples[:4],
        compute_metrics=lambda prediction: {"bleu": 12.5, "chrf": 34.5},
    )
    trainer.train()
    return trainer


def test_card_written_without_pushing(tmp_path):
    trainer = train_tiny_model(
        tmp_path, v0_init="data_driven", v0_estimator="per_sample", v0_num_samples=8, v0_stats_batch_size=2
    )
    trainer.create_model_card(model_name="tiny", tags="mine")
    trainer.create_model_card(model_name="tiny", tags="mine")
    text = (tmp_path / "README.md").read_text()
    metadata = read_metadata(text)
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["metrics"] == ["bleu", "chrf"]
    assert set(metadata["tags"]) == {"mine", "generated_from_trainer", *V0_TAGS}
    assert len(metadata["tags"]) == 4
    assert read_results(text) == [{"task": "text-generation", "dataset": "unknown", "bleu": 12.5, "chrf": 34.5}]
    assert "- Bleu: 12.5\n- Chrf: 34.5" in text
    assert "This model was trained from scratch on" in text
    assert text.count(compose_v0_section(trainer.get_v0_report())) == 1
    assert text.index(SECTION_TITLE) < text.index("## Training procedure")


def test_card_of_a_named_task_without_v0(tmp_path):
    trainer = train_tiny_model(tmp_path)
    trainer.create_model_card(tasks="translation")
    text = (tmp_path / "README.md").read_text()
    assert trainer.get_v0_report() is None
    assert read_metadata(text)["pipeline_tag"] == "translation"
    assert text.count(compose_v0_section(None)) == 1
    assert TAG in read_metadata(text)["tags"] and PAPER_TAG not in read_metadata(text)["tags"]
    assert read_results(text)[0] == {"task": "translation", "dataset": "unknown", "bleu": 12.5, "chrf": 34.5}
