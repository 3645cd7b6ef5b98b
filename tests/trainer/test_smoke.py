"""What a user does first, in a minute: run on the newest versions with all tests, on the oldest by `make test-oldest`."""

import json

import accelerate
import pytest
import torch
import transformers
from conftest import make_gpt2, make_sequences
from trainers import assert_equal_weights, make_arguments, make_trainer, train
from transformers import HfArgumentParser, Trainer

from hf_v0init import (
    V0DiagnosticsCallback,
    V0InitCallback,
    V0InitSeq2SeqTrainer,
    V0InitSeq2SeqTrainingArguments,
    V0InitTrainingArguments,
    attach_v0,
    initialize_v0,
    read_second_moment,
)

PER_SAMPLE = {"v0_init": "data_driven", "v0_estimator": "per_sample"}
WAYS = [
    {"v0_init": "random"}, {"v0_init": "first_gradient"}, {"v0_init": "data_driven", "v0_estimation_steps": 2}, PER_SAMPLE,
    PER_SAMPLE | {"gradient_accumulation_steps": 2}, {"v0_init": "data_driven", "v0_decay": "beta2", "v0_estimation_steps": 2},
    {"v0_init": "data_driven", "v0_decay_steps": 0.34}, {"v0_init": "random", "v0_optimizer": "torch.optim:NAdam", "v0_decay_steps": 2},
    {"v0_init": "data_driven", "bf16": True}, PER_SAMPLE | {"bf16": True},
    {"v0_init": "data_driven", "gradient_checkpointing": True}, {"v0_init": "data_driven", "auto_find_batch_size": True},
    {"v0_init": "data_driven", "v0_record_run": True, "eval_strategy": "steps", "eval_steps": 1},
]  # fmt: skip


def test_the_versions_are_named(capsys):
    with capsys.disabled():
        print(
            f"\ntransformers {transformers.__version__}, accelerate {accelerate.__version__}, torch {torch.__version__}"
        )
    assert transformers.__version__.split(".")[0] == "5"


@pytest.mark.parametrize("options", WAYS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_run_writes_its_v0_and_trains(tmp_path, options):
    model = make_gpt2()
    trainer = train(
        tmp_path, model=model, max_steps=6, learning_rate=0.05, kwargs={"eval_dataset": make_sequences(4)}, **options
    )
    assert trainer.state.global_step == 6
    report = trainer.get_v0_report()
    assert report["num_parameters_with_v0"] == (28 if report["decay"] == "linear" else 10) and report["v0_max"] > 0


def test_zeros_a_callback_and_a_resumed_run_are_the_runs_that_they_stand_for(tmp_path):
    assert_equal_weights(train(tmp_path / "a", stock=True), train(tmp_path / "b", v0_init="zeros"))
    options = {"v0_init": "data_driven", "save_strategy": "steps", "save_steps": 2}
    ours = train(tmp_path / "c", **options)
    resumed = make_trainer(tmp_path / "c", model=make_gpt2(seed=9), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-2"))
    assert_equal_weights(ours, resumed)
    stock = Trainer(make_gpt2(), make_arguments(tmp_path / "d", v0=False), train_dataset=make_sequences())
    V0InitCallback(v0_init="data_driven").attach(stock)
    stock.train()
    assert_equal_weights(ours, stock)


def test_untuned_warmup_and_diagnostics(tmp_path):
    trainer = make_trainer(tmp_path, v0_init="data_driven", v0_decay="beta2", untuned_warmup="linear", adam_beta2=0.9)
    diagnostics = V0DiagnosticsCallback().attach(trainer)
    trainer.train()
    rates = [row["learning_rate"] for row in diagnostics.rows]
    assert rates[0] == pytest.approx(1e-2 * 0.05) and rates[1] == pytest.approx(1e-2 * 0.8 * 0.1)


def test_the_card_and_the_record(tmp_path):
    trainer = train(tmp_path, v0_init="data_driven", v0_decay_steps="auto")
    trainer.save_model()
    trainer.create_model_card()
    assert "arxiv:2412.02153" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "v0_init.json").read_text())["length"]["d50"] > 0


def test_the_flags_are_parsed_and_help_is_written():
    parser = HfArgumentParser(V0InitTrainingArguments)
    assert "--v0_estimation_steps" in parser.format_help()
    parsed = parser.parse_args_into_dataclasses(["--output_dir", "x", "--v0_init", "random", "--v0_scale", "2"])[0]
    assert (parsed.v0_init, parsed.v0_scale) == ("random", 2.0)


def test_seq2seq(tmp_path):
    from transformers import MarianMTModel

    from hf_v0init.tasks.translation.post_norm import apply_xavier_initialization, build_post_norm_config

    sizes = {"d_model": 16, "ffn_dim": 16, "num_heads": 2, "num_layers": 1, "dropout": 0.0, "max_positions": 32}
    model = MarianMTModel(build_post_norm_config(40, 1, 2, **sizes))
    apply_xavier_initialization(model)
    arguments = V0InitSeq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        v0_init="data_driven", v0_decay="beta2", predict_with_generate=True, generation_max_length=8,
    )  # fmt: skip
    trainer = V0InitSeq2SeqTrainer(model=model, args=arguments, train_dataset=make_sequences(8))
    trainer.train()
    assert trainer.predict(make_sequences(4)).predictions.shape[0] == 4
    assert trainer.get_v0_report()["v0_max"] > 0


def test_loops_of_ones_own():
    def train_plainly(v0_of):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        accelerator = accelerate.Accelerator(cpu=True)
        rows = [{"x": torch.randn(4), "y": torch.tensor(1)} for _ in range(8)]
        model, optimizer, loader = accelerator.prepare(
            model, optimizer, torch.utils.data.DataLoader(rows, batch_size=2)
        )
        loss_fn = lambda model, batch: torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])  # noqa: E731
        if v0_of == "first steps":
            attach_v0(optimizer, model, v0_init="data_driven", v0_scale=100.0)
        if v0_of == "samples":
            options = {"loss_fn": loss_fn, "accelerator": accelerator, "v0_scale": 100.0}
            initialize_v0(optimizer, model=model, batches=loader, **options)
        for batch in loader:
            accelerator.backward(loss_fn(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        return read_second_moment(optimizer, model.weight).mean()

    assert min(train_plainly("first steps"), train_plainly("samples")) > 20 * train_plainly(None)
