"""v0 in other people's trainers, losses, loaders, collators and callbacks: right, and nothing else changed."""

import logging

import pytest
import torch
from conftest import make_gpt2, make_sequences
from reference import per_sample_gradients
from torch import nn
from trainers import Recorder, assert_equal_weights, make_arguments, make_trainer, record, train, weights_of
from transformers import Trainer, TrainerCallback

from hf_v0init import InputError, V0InitCallback, V0InitTrainer
from hf_v0init.trainer.per_sample import write_trainers_v0
from hf_v0init.trainer.supported_runs import require_supported_run

MINIBATCH = {"v0_init": "data_driven", "v0_decay": "beta2"}
PER_SAMPLE = {"v0_init": "data_driven", "v0_estimator": "per_sample"}
STRATEGIES = [{"v0_init": name, "v0_decay": "beta2"} for name in ("random", "data_driven", "first_gradient")]


def assert_v0_is_mean_square(recorder: Recorder, num_steps: int) -> None:
    """After the first steps the second moment is as from a start at the mean of g^2 so far, g as Adam sees it; beta2 = .999."""
    assert recorder.v0
    for name, v0 in recorder.v0.items():
        assert torch.equal(v0, recorder.gradients[0][name].square()) and v0.max() > 0
        squares = [g[name].double().square() for g in recorder.gradients[:num_steps]]
        u = sum(0.001 * 0.999 ** (num_steps - 1 - i) * square for i, square in enumerate(squares))
        expected = u * (1 + 0.999**num_steps / (1 - 0.999**num_steps))
        torch.testing.assert_close(recorder.moments[num_steps - 1][name].double(), expected, rtol=1e-5, atol=0.0)


# ---- one callback, no subclass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [*STRATEGIES, {"v0_init": "data_driven", "v0_preset": "paper"}], ids=str)
def test_a_callback_on_the_stock_trainer_is_our_trainer_bit_for_bit(tmp_path, settings):
    options = {"max_steps": 4, "gradient_accumulation_steps": 2}
    ours = train(tmp_path / "a", **settings, **options)
    stock = make_trainer(tmp_path / "b", stock=True, **options)
    callback = V0InitCallback(**settings).attach(stock)
    stock.train()
    assert_equal_weights(ours, stock)
    assert callback.report["parameters"] == ours.get_v0_report()["parameters"]


def test_arguments_with_flags_are_enough_for_the_callback_and_without_it_have_no_effect(tmp_path, caplog):
    def make(**asked):
        return Trainer(make_gpt2(), make_arguments(tmp_path, **asked), train_dataset=make_sequences())

    asked = {"v0_init": "random", "v0_decay": "beta2", "v0_scale": 3.0}
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer = make(**asked)
        callback = V0InitCallback().attach(trainer)
        trainer.train()
        assert callback.report["scale"] == 3.0 and "has no effect" not in caplog.text
        for flags, named in (
            (asked, "v0_init=random"),
            ({"untuned_warmup": "trust_radius"}, "untuned_warmup=trust_radius"),
        ):
            caplog.clear()
            trainer = make(**flags)
            trainer.train()
            trainer.train()
            (words,) = [record.getMessage() for record in caplog.records if record.name == "hf_v0init"]
            assert f"{named} has no effect" in words


# ---- losses ----------------------------------------------------------------------------------------------------------------


class Contrastive(nn.Module):
    """CLIP's loss: every other row of the batch is a negative, so a row alone has no loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)

    def forward(self, a, b, labels=None):
        logits = self.left(a) @ self.right(b).T
        target = torch.arange(len(a))
        loss = nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
        return {"loss": loss / 2, "logits": logits}


def make_pairs(num: int) -> list[dict]:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(num, 2, 6, generator=generator)
    return [{"a": a, "b": b, "labels": torch.tensor(0)} for a, b in rows]


def test_in_batch_negatives_get_the_steps_own_squares_and_the_pass_warns(tmp_path, our_log):
    options = {"data": make_pairs(100), "per_device_train_batch_size": 16, "remove_unused_columns": False}
    _, recorder = record(tmp_path / "a", model=Contrastive(), **MINIBATCH, v0_estimation_steps=3, **options)
    assert sorted(recorder.v0) == ["left.weight", "right.weight"]
    assert_v0_is_mean_square(recorder, 3)
    trainer = train(tmp_path / "b", model=Contrastive(), **PER_SAMPLE, **options)
    assert "use --v0_estimator minibatch" in our_log.text  # a single pair has no negatives, and so no gradient
    assert trainer.get_v0_report()["v0_max"] == 0.0


def test_the_pass_over_ragged_rows_skips_and_counts_those_without_a_loss(tmp_path):
    """Its loss is the mean over the tokens of a row, as the training's of a batch of one."""
    rows = [{k: v[: 3 + i % 7] for k, v in row.items()} for i, row in enumerate(make_sequences(12))]
    for index in (2, 7):
        rows[index]["labels"] = torch.full_like(rows[index]["labels"], -100)

    def collate(features):
        length = max(len(f["input_ids"]) for f in features)

        def pad(key, value):
            return torch.stack([nn.functional.pad(f[key], (0, length - len(f[key])), value=value) for f in features])

        return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}

    def loss_alone(model, row):
        batch = {key: value[None] for key, value in row.items()}
        return model(**batch, num_items_in_batch=(row["labels"] != -100).sum()).loss

    model = make_gpt2(dropout=0.0)
    exact = per_sample_gradients(model, [row for i, row in enumerate(rows) if i not in (2, 7)], loss_alone)
    trainer, recorder = record(
        tmp_path, model=model, data=rows, kwargs={"data_collator": collate}, max_steps=1, **PER_SAMPLE
    )
    report = trainer.get_v0_report()
    assert (report["num_samples"], report["num_skipped"]) == (10, 2)
    for name, v0 in recorder.v0.items():
        torch.testing.assert_close(v0.double(), exact[name].square().mean(0), rtol=1e-4, atol=1e-12)


class Normalised(nn.Module):
    """A batch norm over single values per channel, which cannot take a batch of one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x, labels=None):
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


def test_batch_norm_never_gets_a_batch_of_one_and_keeps_its_statistics(tmp_path):
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(i % 3)} for i in range(101)]
    options = {"data": data, "per_device_train_batch_size": 20, "max_steps": 3, "dataloader_drop_last": True}
    stock = train(tmp_path / "a", model=Normalised(), stock=True, **options)
    ours, recorder = record(tmp_path / "b", erase=True, model=Normalised(), **PER_SAMPLE, **options)
    assert_equal_weights(stock, ours)
    assert all(torch.equal(a, b) for a, b in zip(stock.model.buffers(), ours.model.buffers(), strict=True))
    assert ours.get_v0_report()["num_samples"] == 101 and recorder.v0["net.0.weight"].max() > 0


# ---- a Trainer that keeps all that could be disturbed --------------------------------------------------------------------


class MomentumEncoder(nn.Module):
    """MoCo: `forward` moves a second encoder, which is not trained, and fills a buffer that is None before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
        self.key.requires_grad_(False)
        self.register_buffer("last", None)

    def forward(self, a, b, labels=None):
        with torch.no_grad():
            self.key.weight.mul_(0.9).add_(self.query.weight, alpha=0.1)
            target = self.key(b)
            self.last = target.mean(0)
        return {"loss": (self.query(a) - target).square().mean()}


class KeepsMuch:
    """Put before a Trainer: a loss with parameters of its own, which the optimizer trains too, metrics, counts and logs."""

    def __init__(self, *args, **kwargs):
        torch.manual_seed(5)
        self.head = nn.Linear(6, 3)
        self.metrics, self.num_calls = {"train": {"margin": []}}, 0
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            parameters = [*self.model.query.parameters(), *self.head.parameters()]
            self.optimizer = torch.optim.AdamW(parameters, lr=self.args.learning_rate)
        return super().create_optimizer(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs) + self.head(inputs["a"]).square().mean()
        self.num_calls += 1
        self.metrics["train"]["margin"].append(float(loss))
        self.log({"inner": float(loss)})
        return loss


class TheirTrainer(KeepsMuch, Trainer):
    pass


class OurTrainer(KeepsMuch, V0InitTrainer):
    pass


class NoisyPairs(torch.utils.data.Dataset):
    """A data set with a generator of its own."""

    def __init__(self):
        self.rows, self.generator = make_pairs(24), torch.Generator().manual_seed(9)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        row = self.rows[item]
        return row | {"a": row["a"] + torch.randn(6, generator=self.generator)}


class SeededCollator:
    """Masks with a generator of its own, as collators with a `seed` argument do, and remembers what it gave."""

    def __init__(self):
        self.generator, self.seen = torch.Generator().manual_seed(3), []

    def __call__(self, features):
        batch = {key: torch.stack([f[key] for f in features]) for key in features[0]}
        batch["a"] = batch["a"] * (torch.rand(batch["a"].shape, generator=self.generator) > 0.4)
        self.seen.append(batch["a"])
        return batch


def run_with_much(folder, settings: dict | None, erase: bool = True, **options):
    collator = SeededCollator()
    options |= {"model": MomentumEncoder(), "data": NoisyPairs(), "kwargs": {"data_collator": collator}}
    options |= {"max_steps": 3, "remove_unused_columns": False}
    if settings is None:
        return train(folder, trainer_class=TheirTrainer, stock=True, **options), collator
    return record(folder, erase=erase, trainer_class=OurTrainer, **settings, **options)[0], collator


@pytest.mark.parametrize("settings", [*STRATEGIES, PER_SAMPLE], ids=str)
@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
def test_what_trainers_models_and_data_keep_is_what_the_stock_run_leaves(tmp_path, settings, workers):
    stock, drawn = run_with_much(tmp_path / "a", None, **workers)
    ours, drawn_by_ours = run_with_much(tmp_path / "b", settings, **workers)
    assert_equal_weights(stock, ours)
    assert torch.equal(stock.model.last, ours.model.last) and torch.equal(stock.head.weight, ours.head.weight)
    assert ours.metrics == stock.metrics and ours.num_calls == stock.num_calls == 3
    inner = [[entry["inner"] for entry in t.state.log_history if "inner" in entry] for t in (stock, ours)]
    assert inner[0] == inner[1] and len(inner[0]) == 3
    if not workers:
        assert len(drawn.seen) == len(drawn_by_ours.seen)
        assert all(torch.equal(a, b) for a, b in zip(drawn.seen, drawn_by_ours.seen, strict=True))
        with_v0, _ = run_with_much(tmp_path / "c", settings, erase=False)
        parameters = with_v0.get_v0_report()["parameters"]
        assert ("group 0, parameter 1" in parameters) == (settings is not PER_SAMPLE)  # of the head


# ---- loaders, collators, loops -------------------------------------------------------------------------------------------


class OwnLoader(V0InitTrainer):
    def get_train_dataloader(self):
        return self.accelerator.prepare(
            torch.utils.data.DataLoader(make_sequences(16, seed=77), batch_size=4, collate_fn=self.data_collator)
        )


class OwnStep(V0InitTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        inputs["labels"] = inputs["labels"].flip(1)
        return super().training_step(model, inputs, *args, **kwargs)


class OwnSampler(V0InitTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.WeightedRandomSampler([1.0, *[1e-9] * 47], 48)


@pytest.mark.parametrize("trainer_class", [OwnLoader, OwnStep, OwnSampler])
def test_v0_is_of_what_the_run_draws_and_the_pass_is_refused(tmp_path, trainer_class):
    _, recorder = record(tmp_path / "a", trainer_class=trainer_class, **MINIBATCH, v0_estimation_steps=2, max_steps=3)
    assert_v0_is_mean_square(recorder, 2)
    trainer = make_trainer(tmp_path / "b", trainer_class=trainer_class, **PER_SAMPLE)
    with pytest.raises(InputError, match=rf"{trainer_class.__name__}.*v0_estimator=minibatch"):
        trainer.train()


@pytest.mark.parametrize("how", ["constructor", "add_callback"])
def test_v0_is_of_the_weights_of_step_one_whoever_changes_them_before(tmp_path, how):
    class Rescale(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.transformer.wte.weight.mul_(20)

    recorder = Recorder()
    callbacks = [Rescale(), recorder] if how == "constructor" else [recorder]
    recorder.trainer = trainer = make_trainer(tmp_path, **MINIBATCH, max_steps=1, callbacks=callbacks)
    if how == "add_callback":
        trainer.add_callback(Rescale())
    trainer.train()
    assert_v0_is_mean_square(recorder, 1)
    assert weights_of(trainer)["transformer.wte.weight"].abs().max() > 1.0


@pytest.mark.parametrize("settings", [MINIBATCH, PER_SAMPLE], ids=str)
def test_data_are_needed_at_train_and_not_before(tmp_path, settings):
    trainer = V0InitTrainer(model=make_gpt2(), args=make_arguments(tmp_path, **settings))
    assert len(trainer.create_optimizer().param_groups) == 2
    assert "transformer.wte.weight" in trainer.get_decay_parameter_names(trainer.model)
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.train()


def test_data_parallel_is_refused_by_the_pass_alone(tmp_path, monkeypatch):
    """Two GPUs seen by one process: the gradients that Adam sees are those of the whole batch, but the pass would run on one."""
    trainer = make_trainer(tmp_path, **PER_SAMPLE)
    monkeypatch.setattr(type(trainer.args), "n_gpu", property(lambda _: 2))
    require_supported_run(trainer)
    with pytest.raises(InputError, match="DataParallel over 2 GPUs"):
        write_trainers_v0(trainer, trainer.v0_arguments.resolve(), None)


def test_fp16_gradients_of_the_pass_are_divided_by_its_loss_scale(tmp_path, monkeypatch):
    """The pass multiplies an fp16 loss by 1024 against underflow; v0 must not know of it."""
    import hf_v0init.loop.initialize as module

    plain = train(tmp_path / "a", model=make_gpt2(dropout=0.0), max_steps=1, **PER_SAMPLE).get_v0_report()
    trainer = make_trainer(tmp_path / "b", model=make_gpt2(dropout=0.0), max_steps=1, **PER_SAMPLE)
    monkeypatch.setattr(trainer.args, "fp16", True)
    scales, estimate = [], module.estimate_grad_sq_mean
    monkeypatch.setattr(
        module, "estimate_grad_sq_mean", lambda *a, **k: (scales.append(k["loss_scale"]), estimate(*a, **k))[1]
    )
    trainer.train()
    assert scales == [1024.0] and trainer.get_v0_report()["v0_mean"] == pytest.approx(plain["v0_mean"], rel=1e-4)
