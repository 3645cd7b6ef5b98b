"""`V0InitMixin` on a trainer that is not ours: TRL's `SFTTrainer`, with its own data preparation, loss and metrics."""

from dataclasses import dataclass

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from trainers import Recorder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install '.[trl]')")

from hf_v0init import V0InitArguments, V0InitMixin  # noqa: E402
from hf_v0init.records.model_card import compose_v0_section, list_tags  # noqa: E402

SENTENCES = [f"the {animal} {verb} {what}" for animal in ("cat", "dog", "old owl") for verb in ("sees", "eats")
             for what in ("a fish", "the small mouse that ran", "it")]  # fmt: skip


class V0InitSFTTrainer(V0InitMixin, trl.SFTTrainer):
    pass


@dataclass
class V0InitSFTConfig(V0InitArguments, trl.SFTConfig):
    pass


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=["<pad>", "<eos>", "<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(trainer_class, config_class, tokenizer, folder, **arguments):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    recorder = Recorder()
    recorder.trainer = trainer = trainer_class(
        model=make_model(len(tokenizer)),
        args=config_class(output_dir=str(folder), **(settings | arguments)),
        train_dataset=datasets.Dataset.from_list([{"text": sentence} for sentence in SENTENCES]),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.train()
    return trainer, recorder


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    return train(
        V0InitSFTTrainer, V0InitSFTConfig, tokenizer, tmp_path_factory.mktemp("sft"),
        v0_init="data_driven", v0_scale=3.0, v0_estimation_steps=2,
    )  # fmt: skip


def test_v0_is_scale_times_the_mean_square_of_the_first_steps_gradients(run):
    trainer, recorder = run
    assert len(recorder.v0) == 9 and all(trainer.model.get_parameter(name).dim() >= 2 for name in recorder.v0)
    for name, v0 in recorder.v0.items():
        expected = 3.0 * recorder.gradients[0][name].double().square()  # at step 1; the second refines it
        torch.testing.assert_close(v0.double(), expected, rtol=1e-6, atol=0)
        assert v0.max() > 0, name
    assert trainer.get_v0_report()["estimation_steps"] == 2


def test_first_step_obeys_adams_rule(run):
    trainer, recorder = run
    beta2 = trainer.args.adam_beta2
    for name, gradient in recorder.gradients[0].items():
        v0 = recorder.v0.get(name, torch.zeros_like(gradient)).double()
        expected = beta2 * v0 + (1 - beta2) * gradient.double().square()
        torch.testing.assert_close(recorder.moments[0][name].double(), expected, rtol=1e-6, atol=0)


def test_zeros_is_the_stock_trainer_bit_for_bit(tokenizer, tmp_path):
    stock, _ = train(trl.SFTTrainer, trl.SFTConfig, tokenizer, tmp_path / "stock")
    ours, recorder = train(V0InitSFTTrainer, V0InitSFTConfig, tokenizer, tmp_path / "ours", v0_init="zeros")
    assert recorder.v0 == {}  # looked at before the first step: nothing was there
    pairs = zip(stock.model.named_parameters(), ours.model.named_parameters(), strict=True)
    assert all(name == other_name and torch.equal(p, q) for (name, p), (other_name, q) in pairs)
    assert ours.get_v0_report() is None


def test_run_with_v0_sees_the_data_of_the_stock_run(run, tokenizer, tmp_path):
    stock, _ = train(trl.SFTTrainer, trl.SFTConfig, tokenizer, tmp_path)
    mine = [log["num_tokens"] for log in run[0].state.log_history if "num_tokens" in log]
    theirs = [log["num_tokens"] for log in stock.state.log_history if "num_tokens" in log]
    assert mine == theirs
    assert run[0].state.log_history[0]["loss"] == stock.state.log_history[0]["loss"]
    assert any(not torch.equal(p, q) for p, q in zip(run[0].model.parameters(), stock.model.parameters(), strict=True))


def test_card_and_record_are_written(run):
    trainer, _ = run
    trainer.save_model()
    trainer.create_model_card(model_name="tiny", tags=["mine"])
    folder = trainer.args.output_dir
    with open(f"{folder}/README.md", encoding="utf-8") as file:
        card = file.read()
    assert all(card.count(f"- {tag}\n") == 1 for tag in [*list_tags(trainer.get_v0_report()), "mine", "sft"])
    assert card.count(compose_v0_section(trainer.get_v0_report())) == 1
    from hf_v0init.records.report import read_report

    assert read_report(folder) == trainer.get_v0_report()
