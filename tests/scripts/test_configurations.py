"""The shipped configurations: every one is taken by its script, those of a comparison differ in what they compare alone, and
those under the paper's name, and the plans of its tables, run the paper's method."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from script_runs import load_script

from hf_v0init import V0InitArguments
from hf_v0init.compare.comparison_file import read_plan
from hf_v0init.tasks.run import require_possible_run
from hf_v0init.tasks.script_support import parse_arguments

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCRIPT_OF = {
    "translation": "translate", "language_modeling": "clm", "mlm": "mlm", "image_classification": "images", "image_generation": "dcgan",
}  # fmt: skip
TASKS = {
    "translation": "TranslationTask",
    "language_modeling": "CausalTask",
    "mlm": "MaskedTask",
    "image_classification": "ImageTask",
}
FILES = [path for folder in SCRIPT_OF if folder != "mlm" for path in sorted((CONFIGS / folder).glob("*.yaml"))]
SETTINGS = {"multi30k": ("translation", 4), "ptb": ("language_modeling", 4), "ptb_mlm": ("mlm", 4)}  # beside _zeros
COMPARED = {
    "v0_init", "v0_num_samples", "v0_estimator", "v0_decay_steps", "v0_scale", "warmup_steps", "lr_scheduler_type", "output_dir", "accelerator_config",
    "distributed_state",
}  # fmt: skip
PAPER = [path for path in FILES if path.stem.endswith("_paper")]
TABLES = sorted((CONFIGS / "paper").glob("table_*.yaml"))


def find_kind(path: Path) -> str:
    return "mlm" if "_mlm_" in path.name else path.parent.name


def parse(path: Path) -> tuple:
    module = load_script(SCRIPT_OF[find_kind(path)])
    return parse_arguments(module.ARGUMENTS, [str(path), "--use_cpu"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_configuration_is_taken_by_its_script(path, monkeypatch):
    """Every flag is known, none excludes another, and of every model one can be built; nothing is trained."""
    monkeypatch.chdir(CONFIGS.parent)
    parsed, kind = parse(path), find_kind(path)
    training = parsed[3]
    assert training.output_dir == f"runs/{path.stem}" and training.do_train
    if kind == "image_generation":
        load_script("dcgan").require_possible(training)
        return
    module = load_script(SCRIPT_OF[kind])
    task = getattr(module, TASKS[kind])(*parsed)
    require_possible_run(task)
    task.refuse()
    assert task.load_config().model_type
    if "awd_lstm" in path.stem:  # selected on validation data
        assert training.load_best_model_at_end and training.eval_strategy == training.save_strategy == "epoch"
        assert (training.metric_for_best_model, training.greater_is_better) == ("loss", False)
        assert max(parsed[2].lr_decay_epochs) < training.num_train_epochs and training.lr_scheduler_type == "constant"


@pytest.mark.parametrize("family", SETTINGS)
def test_configurations_of_a_comparison_differ_only_in_what_they_compare(family):
    folder, number = SETTINGS[family]
    paths = [
        path
        for path in FILES
        if path.stem.startswith(f"{family}_") and find_kind(path) == folder and "awd" not in path.stem
    ]
    assert len(paths) == number
    reference = parse(next(path for path in paths if path.stem == f"{family}_zeros"))
    for path in paths:
        *parsed, training = (part for index, part in enumerate(parse(path)) if index <= 3)
        *others, zeros = reference[:4]
        assert parsed == others, path.name
        shared = {f.name for f in dataclasses.fields(zeros) if f.init} - COMPARED
        assert {n: getattr(training, n) for n in shared} == {n: getattr(zeros, n) for n in shared}, path.name
        assert (training.warmup_steps > 0) == path.stem.endswith("_warmup")


def test_the_papers_recipes():
    _, data, run, training, *_ = parse(CONFIGS / "language_modeling" / "ptb_awd_lstm_paper.yaml")
    assert (training.per_device_train_batch_size, data.block_size, training.num_train_epochs) == (20, 70, 200)
    assert (training.learning_rate, run.lr_decay_epochs, training.max_grad_norm) == (0.01, [100, 145], 0.25)
    _, data, run, training, *_ = parse(CONFIGS / "image_classification" / "cifar10_resnet34_paper.yaml")
    assert (run.lr_decay_epochs, run.lr_decay_factor) == ([60, 120, 160], 0.2)
    assert (training.num_train_epochs, training.per_device_train_batch_size, training.learning_rate) == (200, 128, 1e-3)
    assert training.label_smoothing_factor == 0.1 and data.random_crop == "pad" and data.random_flip
    _, data, run, training, generation = parse(CONFIGS / "translation" / "iwslt14_paper.yaml")
    assert (data.max_tokens_per_batch, training.num_train_epochs, run.average_checkpoints) == (4096, 55, 5)
    assert (training.learning_rate, training.warmup_steps, training.adam_beta2) == (1.5e-3, 8000, 0.98)
    assert (generation.num_beams, generation.length_penalty) == (5, 1.0)


def read_v0(flags: dict) -> V0InitArguments:
    """The v0 settings among a run's flags, resolved as a Trainer resolves them."""
    return V0InitArguments(**{name: flags[name] for name in V0InitArguments.__dataclass_fields__ if name in flags})


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_configuration_of_the_paper_takes_its_preset(path):
    flags = yaml.safe_load(path.read_text(encoding="utf-8"))
    plan = read_v0(flags).resolve()
    assert flags["v0_preset"] == "paper"
    assert (plan.init, plan.decay, plan.estimator, plan.num_samples) == ("data_driven", "beta2", "per_sample", 5000)
    assert plan.scale == 1.0 and not plan.include_bias_and_norm and not plan.keeps_plateau


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_run_of_the_papers_tables_takes_v0_from_single_samples(path, small, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    plan = read_plan(path, small=small)
    assert plan.runs
    for run in plan.runs:
        settings = read_v0(run.arguments).resolve(1000)
        if settings.init == "data_driven":
            assert (settings.decay, settings.estimator) == ("beta2", "per_sample"), run.name
        if settings.init == "random" and path.stem != "table_06":  # which is over the scale
            assert settings.scale == 100.0, run.name
