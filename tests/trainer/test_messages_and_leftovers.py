"""What an earlier run left in a checkpoint of the same name, what the callback shows, and settings that do nothing."""

import logging

import pytest
from trainers import make_gpt2, make_sequences
from transformers import Trainer, TrainingArguments

from hf_v0init import InputError, V0InitArguments, V0InitCallback


def train(folder, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True
    )  # fmt: skip
    trainer = Trainer(model=make_gpt2(), args=arguments, train_dataset=make_sequences(8))
    if options:
        V0InitCallback(**options).attach(trainer)
    trainer.train()


def test_a_checkpoint_holds_no_decay_of_an_earlier_run_in_the_folder(tmp_path):
    train(tmp_path, v0_init="data_driven", v0_decay_steps=4, v0_estimation_steps=1)
    assert (tmp_path / "checkpoint-2" / "v0_decay.pt").is_file()
    train(tmp_path, v0_init="data_driven", v0_decay_steps=2, v0_estimation_steps=1)
    assert not (tmp_path / "checkpoint-4" / "v0_decay.pt").exists()
    assert (tmp_path / "checkpoint-4" / "v0_init.json").is_file()
    train(tmp_path, v0_init="zeros")
    assert not (tmp_path / "checkpoint-4" / "v0_init.json").exists()


def test_the_callback_on_a_stock_trainer_shows_what_v0_does(tmp_path):
    logger = logging.getLogger("hf_v0init")
    logger.setLevel(logging.WARNING)
    train(tmp_path, v0_init="data_driven", v0_decay_steps=3)
    assert logger.level == logging.INFO


def test_a_preset_without_a_v0_is_warned_of(caplog):
    V0InitArguments(v0_preset="paper")
    assert "v0_init=data_driven" in caplog.text


def test_a_callback_is_given_its_strategy_by_name():
    with pytest.raises(InputError, match="v0_init='data_driven'"):
        V0InitCallback("data_driven")
