"""Parameters without a gradient, streams, batch size finding, searches and adapters: v0 is the one that it would be without."""

import pytest
import torch
from conftest import make_gpt2, make_sequences
from trainers import Recorder, assert_equal_weights, assert_recurrence, make_arguments, record, train

from hf_v0init import V0InitTrainer

MINIBATCH = {"v0_init": "data_driven", "v0_decay": "beta2"}
PER_SAMPLE = {"v0_init": "data_driven", "v0_estimator": "per_sample"}


class WithUnused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gpt2 = make_gpt2()
        self.unused = torch.nn.Linear(4, 4)

    def forward(self, input_ids, labels=None):
        return self.gpt2(input_ids=input_ids, labels=labels)


def test_parameters_without_gradient_are_reported(tmp_path):
    for name, settings in (("a", PER_SAMPLE), ("b", MINIBATCH)):
        trainer, recorder = record(tmp_path / name, model=WithUnused(), max_steps=1, **settings)
        assert trainer.get_v0_report()["without_gradient"] == ["unused.weight"]
        assert sum(bool(v0.any()) for v0 in recorder.v0.values()) == 10
        assert "unused.weight" not in recorder.v0 or not recorder.v0["unused.weight"].any()


def test_lora_a_gets_its_v0_at_step_two_where_it_has_its_first_gradient(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = peft.get_peft_model(make_gpt2(), config)
    trainer, recorder = record(tmp_path, model=model, **MINIBATCH, v0_scale=5.0, max_steps=3, max_grad_norm=0.0)
    assert all(("lora_B" in name) == bool(v0.any()) for name, v0 in recorder.v0.items())
    assert_recurrence(recorder)
    late = [name for name in recorder.gradients[1] if "lora_A" in name]
    assert len(late) == 2 and trainer.get_v0_report()["num_parameters_with_v0"] == 2
    for name in late:
        g, v2 = recorder.gradients[1][name].double(), recorder.moments[1][name].double()
        torch.testing.assert_close(v2, 0.999 * 5.0 * g.square() + 0.001 * g.square(), rtol=1e-5, atol=0)
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {3.0}


class FirstBatchTooLarge(V0InitTrainer):
    """As a GPU that runs out of memory at the first batch size: in the first forward, or in the third."""

    fails_at, calls = None, 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        type(self).calls += 1  # no attribute of the Trainer, which the pass would put back
        if self.calls == self.fails_at:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("settings", "fails_at"), [(PER_SAMPLE, 1), (PER_SAMPLE, 3), (MINIBATCH | {"v0_estimation_steps": 3}, 3)]
)
def test_auto_find_batch_size_writes_v0_once(tmp_path, monkeypatch, settings, fails_at):
    monkeypatch.setattr(FirstBatchTooLarge, "fails_at", fails_at)
    monkeypatch.setattr(FirstBatchTooLarge, "calls", 0)
    trainer, recorder = record(tmp_path, trainer_class=FirstBatchTooLarge, auto_find_batch_size=True, **settings)
    assert trainer._train_batch_size == 3  # the Trainer takes nine tenths of 4
    assert trainer.state.global_step == 5
    assert len(recorder.v0) == 10 and all(v0.any() for v0 in recorder.v0.values())


class Stream(torch.utils.data.IterableDataset):
    """Can be iterated again and again."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


def test_streams_equal_their_list(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = make_sequences(32)
    theirs = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows])
    options = PER_SAMPLE | {"max_steps": 2}
    _, listed = record(tmp_path / "a", data=rows, model=make_gpt2(dropout=0.0), **options)
    for name, stream in (("b", Stream(rows)), ("c", theirs.to_iterable_dataset())):
        trainer, streamed = record(tmp_path / name, data=stream, model=make_gpt2(dropout=0.0), **options)
        for key, v0 in listed.v0.items():
            torch.testing.assert_close(streamed.v0[key], v0, rtol=1e-5, atol=1e-12)
        assert trainer.get_v0_report()["num_samples"] == 32
    stock = train(tmp_path / "d", data=Stream(rows), stock=True, max_steps=4)
    for number, settings in enumerate((MINIBATCH, PER_SAMPLE)):
        ours, _ = record(tmp_path / f"e{number}", data=Stream(rows), erase=True, max_steps=4, **settings)
        assert_equal_weights(stock, ours)


def test_every_trial_of_a_hyperparameter_search_gets_its_v0(tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    recorder_of_trial = []

    class Watch(Recorder):
        def on_train_begin(self, args, state, control, **kwargs):
            self.v0 = self.hooked = None

        def on_train_end(self, args, state, control, **kwargs):
            recorder_of_trial.append((args.learning_rate, self.v0))

    watch = Watch()
    watch.trainer = trainer = V0InitTrainer(
        model_init=lambda: make_gpt2(dropout=0.0),
        args=make_arguments(tmp_path, **MINIBATCH, max_steps=2, eval_strategy="steps", eval_steps=2),
        train_dataset=make_sequences(),
        eval_dataset=make_sequences(8, seed=8),
        callbacks=[watch],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        backend="optuna",
        n_trials=3,
    )
    assert len(recorder_of_trial) == 3 and len({rate for rate, _ in recorder_of_trial}) == 3
    first = recorder_of_trial[0][1]
    for _, v0 in recorder_of_trial:
        assert len(v0) == 10 and all(torch.equal(v0[name], first[name]) for name in first)
