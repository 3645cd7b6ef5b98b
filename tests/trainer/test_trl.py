"""`V0InitMixin` on a trainer that is not ours: TRL's `SFTTrainer`, with its own data preparation, loss and metrics."""

from dataclasses import dataclass

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install '.[trl]')")

from hf_v0init import V0InitArguments, V0InitMixin  # noqa: E402
from hf_v0init.optimizers.state import unwrap_optimizer  # noqa: E402
from hf_v0init.records.model_card import V0_TAGS, compose_v0_section  # noqa: E402

SENTENCES = [f"the {animal} {verb} {what}" for animal in ("cat", "dog", "old owl") for verb in ("sees", "eats")
             for what in ("a fish", "the small mouse that ran", "it")]  # fmt: skip


class V0InitSFTTrainer(V0InitMixin, trl.SFTTrainer):
    pass


@dataclass
class V0InitSFTConfig(V0InitArguments, trl.SFTConfig):
    pass


class Recorder(TrainerCallback):
    """Copies, at the first step: v0, the gradients that the optimizer sees, the second moment after the step."""

    def __init__(self):
        self.v0, self.gradients, self.v1 = {}, {}, {}
        self.trainer = None
        self.num_tokens_before_first_step = self.metrics_before_first_step = None

    def read_second_moments(self) -> dict[str, torch.Tensor]:
        state = unwrap_optimizer(self.trainer.optimizer).state
        named = self.trainer.accelerator.unwrap_model(self.trainer.model).named_parameters()
        return {name: state[p]["exp_avg_sq"].clone() for name, p in named if state.get(p)}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.v0 = self.read_second_moments()
            self.num_tokens_before_first_step = self.trainer._total_train_tokens
            self.metrics_before_first_step = {key: list(v) for key, v in self.trainer._metrics["train"].items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.gradients = {n: p.grad.clone() for n, p in self.trainer.model.named_parameters()}

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.v1 = self.read_second_moments()


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


def compute_grad_sq_mean_slowly(trainer, vocab_size: int) -> dict[str, torch.Tensor]:
    """E[g^2] in float64: one sample at a time, cross entropy by the book, no part of the package or of TRL's loss."""
    model = make_model(vocab_size).double().train()
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for sample in trainer.train_dataset:
        token_ids = torch.tensor([sample["input_ids"]])
        model.zero_grad()
        logits = model(input_ids=token_ids).logits
        functional.cross_entropy(logits[0, :-1], token_ids[0, 1:]).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.square()
    return {name: total / len(trainer.train_dataset) for name, total in sums.items()}


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    return train(
        V0InitSFTTrainer, V0InitSFTConfig, tokenizer, tmp_path_factory.mktemp("sft"),
        v0_init="data_driven", v0_scale=3.0, v0_stats_batch_size=1,
    )  # fmt: skip


def test_v0_is_scale_times_the_mean_square_of_per_sample_gradients(run, tokenizer):
    trainer, recorder = run
    expected = compute_grad_sq_mean_slowly(trainer, len(tokenizer))
    with_v0 = {name for name, grad_sq_mean in expected.items() if grad_sq_mean.dim() >= 2}
    assert recorder.v0.keys() == with_v0
    assert len(with_v0) == 9
    for name in with_v0:
        torch.testing.assert_close(recorder.v0[name].double(), 3.0 * expected[name], rtol=1e-4, atol=1e-12)
        assert recorder.v0[name].max() > 0, name
    assert trainer.get_v0_report()["num_samples"] == len(SENTENCES)


def test_first_step_obeys_adams_rule(run):
    trainer, recorder = run
    beta2 = trainer.args.adam_beta2
    assert recorder.v1.keys() == recorder.gradients.keys()
    for name, gradient in recorder.gradients.items():
        v0 = recorder.v0.get(name, torch.zeros_like(gradient)).double()
        expected = beta2 * v0 + (1 - beta2) * gradient.double().square()
        torch.testing.assert_close(recorder.v1[name].double(), expected, rtol=1e-6, atol=0)


def test_pass_leaves_no_trace_in_the_trainers_own_metrics(run):
    trainer, recorder = run
    assert recorder.num_tokens_before_first_step == 0
    assert not any(recorder.metrics_before_first_step.values())
    first_log = trainer.state.log_history[0]
    assert first_log["num_tokens"] < sum(len(sample["input_ids"]) for sample in trainer.train_dataset)


def test_zeros_is_the_stock_trainer_bit_for_bit(tokenizer, tmp_path):
    stock, _ = train(trl.SFTTrainer, trl.SFTConfig, tokenizer, tmp_path / "stock")
    ours, recorder = train(V0InitSFTTrainer, V0InitSFTConfig, tokenizer, tmp_path / "ours", v0_init="zeros")
    assert recorder.v0 == {}
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
    assert all(card.count(f"- {tag}\n") == 1 for tag in [*V0_TAGS, "mine", "sft"])
    assert card.count(compose_v0_section(trainer.get_v0_report())) == 1
    from hf_v0init.records.report import read_report

    assert read_report(folder) == trainer.get_v0_report()
