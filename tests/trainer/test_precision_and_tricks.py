"""Precision, memory savings and Trainer features: the invariants of test_trainer.py hold under each."""

import pytest
import torch
from conftest import make_gpt2, make_sequences
from trainers import (
    Recorder,
    assert_equal_weights,
    make_arguments,
    make_trainer,
    record,
    train,
    weights_of,
)

from hf_v0init import V0InitTrainer, attach_v0, read_second_moment

PER_SAMPLE = {"v0_init": "data_driven", "v0_decay": "beta2", "v0_estimator": "per_sample"}


def assert_recurrence(recorder, beta2=0.999, rtol=1e-6):
    for name, v1 in recorder.moments[0].items():
        g = recorder.gradients[0][name].double()
        v0 = recorder.v0[name].double() if name in recorder.v0 else torch.zeros_like(g)
        torch.testing.assert_close(v1.double(), beta2 * v0 + (1 - beta2) * g.square(), rtol=rtol, atol=1e-20)


MODES = {
    "bf16_autocast": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "neftune": {"neftune_noise_alpha": 5.0},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "accumulation_and_clipping": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [{"v0_init": "data_driven", "v0_decay": "beta2"}, {"v0_init": "first_gradient", "v0_decay": "beta2"}, PER_SAMPLE],
    ids=str,
)
def test_no_side_effect_and_the_recurrence(tmp_path, mode, settings):
    options = MODES[mode] | {"max_steps": 3}
    _, recorder = record(tmp_path / "r", **settings, **options | {"max_steps": 1})
    assert_recurrence(recorder)
    stock = train(tmp_path / "a", stock=True, **options)
    ours, recorder = record(tmp_path / "b", erase=True, **settings, **options)
    assert len(recorder.v0) == 10
    assert_equal_weights(stock, ours)


@pytest.mark.parametrize("mode", MODES)
def test_v0_is_of_the_gradients_that_adam_sees(tmp_path, mode):
    _, recorder = record(tmp_path, v0_init="data_driven", v0_decay="beta2", max_steps=3, **MODES[mode])
    for name, v0 in recorder.v0.items():
        torch.testing.assert_close(v0.double(), recorder.gradients[0][name].double().square(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("mode", MODES)
def test_zeros_is_the_stock_trainer_bit_for_bit(tmp_path, mode):
    assert_equal_weights(
        train(tmp_path / "a", stock=True, **MODES[mode]), train(tmp_path / "b", v0_init="zeros", **MODES[mode])
    )


@pytest.mark.parametrize("mode", ["checkpointing", "compiled"])
def test_v0_does_not_depend_on_how_memory_or_time_is_saved(tmp_path, mode):
    plain = {"model": make_gpt2(dropout=0.0), "v0_init": "data_driven", "v0_decay": "beta2", "max_steps": 1}
    _, expected = record(tmp_path / "a", **plain)
    _, saved = record(tmp_path / "b", **plain | {"model": make_gpt2(dropout=0.0)} | MODES[mode])
    for name, v0 in expected.v0.items():
        torch.testing.assert_close(saved.v0[name], v0, rtol=1e-5, atol=1e-12)


def test_bf16_autocast_gives_v0_near_that_of_fp32(tmp_path):
    plain = {"model": make_gpt2(dropout=0.0), "v0_init": "data_driven", "v0_decay": "beta2", "max_steps": 1}
    _, fp32 = record(tmp_path / "a", **plain)
    trainer, bf16 = record(tmp_path / "b", **plain | {"model": make_gpt2(dropout=0.0), "bf16": True})
    for name, v0 in fp32.v0.items():
        assert bf16.v0[name].dtype == torch.float32
        assert bf16.v0[name].sum().item() == pytest.approx(v0.sum().item(), rel=0.05)
    assert trainer.get_v0_report()["num_parameters_with_v0"] == 10


@pytest.mark.parametrize("strategy", ["random", "data_driven", "first_gradient"])
def test_bf16_parameters_have_bf16_state_from_fp32_sums(tmp_path, strategy):
    _, fp32 = record(tmp_path / "a", model=make_gpt2(dropout=0.0), v0_init=strategy, v0_decay="beta2", max_steps=1)
    model = make_gpt2(dropout=0.0).to(torch.bfloat16)
    trainer, bf16 = record(tmp_path / "b", model=model, v0_init=strategy, v0_decay="beta2", max_steps=2)
    for name, v0 in fp32.v0.items():
        assert bf16.v0[name].dtype == torch.bfloat16
        assert bf16.v0[name].float().sum().item() == pytest.approx(v0.sum().item(), rel=0.05), name
    state = next(iter(trainer.optimizer.state.values()))
    assert state["exp_avg"].dtype == torch.bfloat16 and state["step"].item() == 2.0


@pytest.mark.parametrize("fused", [True, False])
def test_fp16_overflow_on_the_first_step_does_not_lose_v0(fused):
    """A loss scaler skips the step whose gradients overflowed; the state must stand until the step that counts."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.98), fused=fused)
    attach_v0(optimizer, v0_init="data_driven", v0_decay="beta2", v0_scale=3.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    g = torch.randn(4, 3)
    before = p.detach().clone()
    for gradient in (torch.full((4, 3), float("inf")), g):
        optimizer.zero_grad()
        scaler.scale((p * 1.0).sum()).backward()
        p.grad.copy_(gradient * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        if gradient is not g:
            assert read_second_moment(optimizer, p) is None or not read_second_moment(optimizer, p).any()
            assert torch.equal(p, before)
    v0 = 3.0 * g.square()
    torch.testing.assert_close(read_second_moment(optimizer, p), 0.98 * v0 + 0.02 * g.square(), rtol=1e-5, atol=1e-8)
    assert optimizer.state[p]["step"].item() == 1.0


def test_reentrant_checkpointing_of_a_shared_module_is_the_plain_one(tmp_path):
    """The gradient of a block that is used twice arrives in two parts; only their sum has the square that is meant."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}

    def make_shared():
        model = make_gpt2(dropout=0.0)
        model.transformer.h[1] = model.transformer.h[0]
        return model

    _, plain = record(tmp_path / "a", model=make_shared(), max_steps=1, max_grad_norm=0.0, **PER_SAMPLE)
    _, saved = record(tmp_path / "b", model=make_shared(), max_steps=1, max_grad_norm=0.0, **PER_SAMPLE, **options)
    assert_recurrence(saved)
    for name, v0 in plain.v0.items():
        torch.testing.assert_close(saved.v0[name], v0, rtol=1e-4, atol=1e-12)


def test_frozen_parameters_get_no_state(tmp_path):
    model = make_gpt2()
    for p in model.transformer.h[0].parameters():
        p.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer, recorder = record(
        tmp_path, model=model, v0_init="data_driven", v0_decay="beta2", max_steps=2, max_grad_norm=0.0
    )
    assert len(recorder.v0) == 6 and not any(name.startswith("transformer.h.0") for name in recorder.v0)
    assert_recurrence(recorder)
    after = weights_of(trainer)
    assert all(torch.equal(w, after[n]) for n, w in before.items())


class WithUnused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gpt2 = make_gpt2()
        self.unused = torch.nn.Linear(4, 4)

    def forward(self, input_ids, labels=None):
        return self.gpt2(input_ids=input_ids, labels=labels)


def test_parameters_without_gradient_are_reported(tmp_path):
    trainer, recorder = record(tmp_path / "a", model=WithUnused(), max_steps=1, **PER_SAMPLE)
    assert trainer.get_v0_report()["without_gradient"] == ["unused.weight"]
    assert not recorder.v0["unused.weight"].any()
    assert sum(bool(v0.any()) for v0 in recorder.v0.values()) == 10
    trainer, recorder = record(tmp_path / "b", model=WithUnused(), v0_init="data_driven", v0_decay="beta2", max_steps=1)
    assert trainer.get_v0_report()["without_gradient"] == ["unused.weight"]
    assert "unused.weight" not in recorder.v0 and len(recorder.v0) == 10


def test_rows_that_no_sample_touched_are_counted(tmp_path):
    """Untied embeddings: tokens 20..39 are in no sample, so 20 rows of wte have v0 = 0, as in stock Adam."""
    data = [{k: v % 19 + 1 for k, v in row.items()} for row in make_sequences()]
    trainer, plain = record(
        tmp_path,
        model=make_gpt2(tie_word_embeddings=False),
        data=data,
        v0_init="data_driven",
        v0_decay="beta2",
        v0_estimation_steps=8,
        max_steps=12,
    )
    wte = plain.moments[7]["transformer.wte.weight"]
    assert not wte[20:].any() and wte[1:20].any(1).all()
    assert trainer.get_v0_report()["parameters"]["transformer.wte.weight"]["zeros"] == int((wte == 0).sum())


def test_lora_a_gets_its_v0_at_step_two_where_it_has_its_first_gradient(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = peft.get_peft_model(make_gpt2(), config)
    trainer, recorder = record(
        tmp_path, model=model, v0_init="data_driven", v0_decay="beta2", v0_scale=5.0, max_steps=3, max_grad_norm=0.0
    )
    assert all(("lora_B" in name) == bool(v0.any()) for name, v0 in recorder.v0.items())
    assert_recurrence(recorder)
    late = [name for name in recorder.gradients[1] if "lora_A" in name]
    assert len(late) == 2 and trainer.get_v0_report()["num_parameters_with_v0"] == 2
    for name in late:
        g = recorder.gradients[1][name].double()
        torch.testing.assert_close(
            recorder.moments[1][name].double(), 0.999 * 5.0 * g.square() + 0.001 * g.square(), rtol=1e-5, atol=0
        )
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {3.0}


class FirstBatchTooLarge(V0InitTrainer):
    """As a GPU that runs out of memory at the first batch size: in the pass, or in the second training step."""

    fails_at = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == self.fails_at:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    "settings", [{"v0_init": "data_driven", "v0_decay": "beta2", "v0_estimation_steps": 3}, PER_SAMPLE], ids=str
)
@pytest.mark.parametrize("fails_at", [1, 3])
def test_auto_find_batch_size_writes_v0_once(tmp_path, fails_at, settings):
    FirstBatchTooLarge.fails_at = fails_at
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, trainer_class=FirstBatchTooLarge, auto_find_batch_size=True, callbacks=[recorder], **settings,
    )  # fmt: skip
    recorder.trainer = trainer
    trainer.train()
    assert trainer._train_batch_size == 3  # the Trainer takes nine tenths of 4
    assert trainer.state.global_step == 5
    assert len(recorder.v0) == 10 and all(v0.any() for v0 in recorder.v0.values())


class Stream(torch.utils.data.IterableDataset):
    """Can be iterated again and again."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


def test_iterable_data_set_equals_its_list(tmp_path):
    rows = make_sequences(32)
    common = PER_SAMPLE | {"max_steps": 2}
    _, listed = record(tmp_path / "a", data=rows, model=make_gpt2(dropout=0.0), **common)
    _, streamed = record(tmp_path / "b", data=Stream(rows), model=make_gpt2(dropout=0.0), **common)
    for name, v0 in listed.v0.items():
        torch.testing.assert_close(streamed.v0[name], v0, rtol=1e-5, atol=1e-12)
    stock = train(tmp_path / "c", data=Stream(rows), stock=True, max_steps=4)
    for number, settings in enumerate(({"v0_init": "data_driven", "v0_decay": "beta2"}, PER_SAMPLE)):
        ours, _ = record(tmp_path / f"d{number}", data=Stream(rows), erase=True, max_steps=4, **settings)
        assert_equal_weights(stock, ours)


def test_streaming_data_set_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = make_sequences(32)
    stream = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows]).to_iterable_dataset()
    common = PER_SAMPLE | {"max_steps": 2}
    _, listed = record(tmp_path / "a", data=rows, model=make_gpt2(dropout=0.0), **common)
    trainer, streamed = record(tmp_path / "b", data=stream, model=make_gpt2(dropout=0.0), **common)
    for name, v0 in listed.v0.items():
        torch.testing.assert_close(streamed.v0[name], v0, rtol=1e-5, atol=1e-12)
    assert trainer.get_v0_report()["num_samples"] == 32


def test_every_trial_of_a_hyperparameter_search_gets_its_v0(tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    recorder_of_trial = []

    class Watch(Recorder):
        def on_train_begin(self, args, state, control, **kwargs):
            self.v0 = self.hooked = None

        def on_train_end(self, args, state, control, **kwargs):
            recorder_of_trial.append((args.learning_rate, self.v0))

    watch = Watch()
    trainer = V0InitTrainer(
        model_init=lambda: make_gpt2(dropout=0.0),
        args=make_arguments(
            tmp_path, v0_init="data_driven", v0_decay="beta2", max_steps=2, eval_strategy="steps", eval_steps=2
        ),
        train_dataset=make_sequences(),
        eval_dataset=make_sequences(8, seed=8),
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        backend="optuna",
        n_trials=3,
    )
    assert len(recorder_of_trial) == 3 and len({rate for rate, _ in recorder_of_trial}) == 3
    first = recorder_of_trial[0][1]
    for _, v0 in recorder_of_trial:
        assert len(v0) == 10 and all(torch.equal(v0[name], first[name]) for name in first)
