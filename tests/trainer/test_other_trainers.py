"""v0 in other people's trainers, losses, loaders, collators and callbacks: right, and nothing else changed."""

import logging

import pytest
import torch
from conftest import VOCAB, make_gpt2, make_sequences
from reference import per_sample_gradients
from torch import nn
from trainers import Recorder, assert_equal_weights, make_arguments, make_trainer, record, train
from transformers import Trainer, TrainerCallback

from hf_v0init import InputError, V0InitCallback, V0InitTrainer
from hf_v0init.trainer.per_sample import write_trainers_v0
from hf_v0init.trainer.supported_runs import require_supported_run

PER_SAMPLE = {"v0_init": "data_driven", "v0_decay": "beta2", "v0_estimator": "per_sample"}
STRATEGIES = ["random", "data_driven", "first_gradient"]


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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_callback_on_the_stock_trainer_is_our_trainer_bit_for_bit(tmp_path, strategy):
    ours = train(tmp_path / "a", v0_init=strategy, v0_decay="beta2", max_steps=6, gradient_accumulation_steps=2)
    stock = make_trainer(tmp_path / "b", stock=True, max_steps=6, gradient_accumulation_steps=2)
    callback = V0InitCallback(v0_init=strategy, v0_decay="beta2")
    callback.attach(stock)
    stock.train()
    assert_equal_weights(ours, stock)
    assert callback.report["parameters"] == ours.get_v0_report()["parameters"]


def test_a_callback_that_knows_its_trainer_runs_the_papers_pass(tmp_path):
    ours = train(tmp_path / "a", v0_init="data_driven", v0_preset="paper", max_steps=3)
    stock = make_trainer(tmp_path / "b", stock=True, max_steps=3)
    callback = V0InitCallback(v0_init="data_driven", v0_preset="paper").attach(stock)
    stock.train()
    assert_equal_weights(ours, stock)
    assert callback.report["num_samples"] == 48
    alone = make_trainer(tmp_path / "c", stock=True, max_steps=3)
    alone.add_callback(V0InitCallback(v0_init="data_driven", v0_preset="paper"))
    with pytest.raises(InputError, match=r"V0InitCallback\(...\).attach\(trainer\)"):
        alone.train()


def test_a_callback_resumes_as_our_trainer_does(tmp_path):
    options = {"stock": True, "max_steps": 8, "save_strategy": "steps", "save_steps": 4}

    def run(folder, resume=None, **more):
        trainer = make_trainer(folder, **options | more)
        callback = V0InitCallback(v0_init="data_driven", v0_decay="beta2", v0_estimation_steps=6)
        callback.attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    straight, written = run(tmp_path)
    resumed, again = run(tmp_path, str(tmp_path / "checkpoint-4"), model=make_gpt2(seed=99))
    assert_equal_weights(straight, resumed)
    assert again.report["parameters"] == written.report["parameters"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"v0_init": "random"}, "v0_init=random"), ({"untuned_warmup": "trust_radius"}, "untuned_warmup=trust_radius")],
)
def test_a_stock_trainer_with_our_arguments_says_once_that_they_have_no_effect(tmp_path, caplog, asked, named):
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer = Trainer(model=make_gpt2(), args=make_arguments(tmp_path, **asked), train_dataset=make_sequences())
        trainer.train()
        trainer.train()
    words = [record.getMessage() for record in caplog.records if record.name == "hf_v0init"]
    assert len(words) == 1 and f"{named} has no effect" in words[0] and "V0InitCallback()" in words[0]


def test_arguments_with_flags_are_enough_for_the_callback(tmp_path, caplog):
    arguments = make_arguments(tmp_path, v0_init="random", v0_decay="beta2", v0_scale=3.0)
    trainer = Trainer(model=make_gpt2(), args=arguments, train_dataset=make_sequences())
    callback = V0InitCallback().attach(trainer)
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer.train()
    assert callback.report["scale"] == 3.0 and "has no effect" not in caplog.text


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


def test_in_batch_negatives_get_the_steps_own_squares_and_the_pass_warns(tmp_path, caplog):
    options = {"data": make_pairs(100), "per_device_train_batch_size": 16, "remove_unused_columns": False}
    _, recorder = record(
        tmp_path / "a", model=Contrastive(), v0_init="data_driven", v0_decay="beta2", v0_estimation_steps=3, **options
    )
    assert sorted(recorder.v0) == ["left.weight", "right.weight"]
    assert_v0_is_mean_square(recorder, 3)
    trainer = make_trainer(tmp_path / "b", model=Contrastive(), **PER_SAMPLE, **options)
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer.train()
    assert "use --v0_estimator minibatch" in caplog.text  # a single pair has no negatives, and so no gradient
    assert trainer.get_v0_report()["v0_max"] == 0.0


def test_the_mean_over_tokens_of_ragged_rows_is_no_reason_to_refuse_and_is_what_adam_sees(tmp_path):
    rows = [
        {"input_ids": row["input_ids"][: 3 + i % 7], "labels": row["labels"][: 3 + i % 7]}
        for i, row in enumerate(make_sequences(30))
    ]

    def collate(features):
        length = max(len(f["input_ids"]) for f in features)
        pad = lambda x, value: nn.functional.pad(x, (0, length - len(x)), value=value)  # noqa: E731
        return {
            "input_ids": torch.stack([pad(f["input_ids"], 0) for f in features]),
            "labels": torch.stack([pad(f["labels"], -100) for f in features]),
        }

    model = make_gpt2(dropout=0.0)

    def loss_alone(model, row):
        num_items = (row["labels"] != -100).sum()
        return model(input_ids=row["input_ids"][None], labels=row["labels"][None], num_items_in_batch=num_items).loss

    exact = per_sample_gradients(model, rows, loss_alone)
    _, recorder = record(
        tmp_path / "a", model=model, data=rows, kwargs={"data_collator": collate}, max_steps=1, **PER_SAMPLE
    )
    for name, v0 in recorder.v0.items():
        torch.testing.assert_close(v0.double(), exact[name].square().mean(0), rtol=1e-4, atol=1e-12)
    _, recorder = record(
        tmp_path / "b",
        data=rows,
        kwargs={"data_collator": collate},
        v0_init="data_driven",
        v0_decay="beta2",
        v0_estimation_steps=4,
    )
    assert_v0_is_mean_square(recorder, 4)


def test_samples_without_a_loss_are_skipped_and_counted(tmp_path):
    data = make_sequences(12)
    for index in (2, 7):
        data[index]["labels"] = torch.full((10,), -100)
    model = make_gpt2(dropout=0.0)
    kept = [row for i, row in enumerate(data) if i not in (2, 7)]
    loss_alone = lambda model, row: model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss * 9 / 10  # noqa: E731
    exact = per_sample_gradients(model, kept, loss_alone)
    trainer, recorder = record(
        tmp_path, model=model, data=data, max_steps=1, per_device_train_batch_size=8, **PER_SAMPLE
    )
    report = trainer.get_v0_report()
    assert (report["num_samples"], report["num_skipped"]) == (10, 2)
    for name, v0 in recorder.v0.items():
        torch.testing.assert_close(v0.double(), exact[name].square().mean(0), rtol=2e-5, atol=1e-13)


class Normalised(nn.Module):
    """A batch norm over single values per channel, which cannot take a batch of one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x, labels=None):
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


@pytest.mark.parametrize("num_samples", [99, 100, 101])
def test_batch_norm_never_gets_a_batch_of_one_and_keeps_its_statistics(tmp_path, num_samples):
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(i % 3)} for i in range(num_samples)]
    options = {
        "data": data,
        "per_device_train_batch_size": 20,
        "max_steps": 3,
        "dataloader_drop_last": num_samples > 20,
    }
    stock = train(tmp_path / "a", model=Normalised(), stock=True, **options)
    ours, recorder = record(tmp_path / "b", erase=True, model=Normalised(), **PER_SAMPLE, **options)
    assert_equal_weights(stock, ours)
    assert all(torch.equal(a, b) for a, b in zip(stock.model.buffers(), ours.model.buffers(), strict=True))
    assert ours.get_v0_report()["num_samples"] == num_samples and recorder.v0["net.0.weight"].max() > 0


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


@pytest.mark.parametrize("settings", [{"v0_init": s, "v0_decay": "beta2"} for s in STRATEGIES] + [PER_SAMPLE])
def test_a_momentum_encoder_is_where_the_stock_run_has_it(tmp_path, settings):
    options = {"data": make_pairs(24), "remove_unused_columns": False, "max_steps": 3}
    stock = train(tmp_path / "a", model=MomentumEncoder(), stock=True, **options)
    ours, _ = record(tmp_path / "b", erase=True, model=MomentumEncoder(), **settings, **options)
    assert_equal_weights(stock, ours)
    assert torch.equal(stock.model.last, ours.model.last)


class WithLossModule:
    """A Trainer whose loss has parameters of its own, which its optimizer trains too."""

    def __init__(self, *args, **kwargs):
        torch.manual_seed(5)
        self.head = nn.Linear(VOCAB, 3)
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            parameters = [*self.model.parameters(), *self.head.parameters()]
            self.optimizer = torch.optim.AdamW(parameters, lr=self.args.learning_rate)
        return super().create_optimizer(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        return nn.functional.cross_entropy(self.head(logits).flatten(0, 1), inputs["labels"].flatten() % 3)


class TheirLoss(WithLossModule, Trainer):
    pass


class OurLoss(WithLossModule, V0InitTrainer):
    pass


@pytest.mark.parametrize("settings", [{"v0_init": s, "v0_decay": "beta2"} for s in STRATEGIES] + [PER_SAMPLE])
def test_a_loss_module_gets_a_v0_and_its_gradients_are_its_own(tmp_path, settings):
    stock = train(tmp_path / "a", trainer_class=TheirLoss, stock=True, max_steps=3)
    ours, _ = record(tmp_path / "b", erase=True, trainer_class=OurLoss, max_steps=3, **settings)
    assert_equal_weights(stock, ours)
    assert torch.equal(stock.head.weight, ours.head.weight)
    parameters = train(tmp_path / "c", trainer_class=OurLoss, max_steps=3, **settings).get_v0_report()["parameters"]
    assert ("group 0, parameter 28" in parameters) == (settings is not PER_SAMPLE)


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
    _, recorder = record(
        tmp_path / "a", trainer_class=trainer_class, v0_init="data_driven", v0_decay="beta2", v0_estimation_steps=2
    )
    assert_v0_is_mean_square(recorder, 2)
    trainer = make_trainer(tmp_path / "b", trainer_class=trainer_class, **PER_SAMPLE)
    with pytest.raises(
        InputError, match=rf"{trainer_class.__name__}, which has a .* of its own.*v0_estimator=minibatch"
    ):
        trainer.train()


class SeededCollator:
    """Masks with a generator of its own, as collators with a `seed` argument do, and remembers what it gave."""

    def __init__(self):
        self.generator, self.seen = torch.Generator().manual_seed(3), []

    def __call__(self, features):
        ids = torch.stack([f["input_ids"] for f in features])
        labels = ids.masked_fill(torch.rand(ids.shape, generator=self.generator) > 0.4, -100)
        self.seen.append(labels)
        return {"input_ids": ids, "labels": labels}


class NoisyData(torch.utils.data.Dataset):
    """A data set with a generator of its own."""

    def __init__(self):
        self.rows, self.generator = make_sequences(), torch.Generator().manual_seed(9)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        shift = int(torch.randint(1, VOCAB, (), generator=self.generator))
        ids = (self.rows[item]["input_ids"] + shift) % VOCAB
        return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("settings", [{"v0_init": s, "v0_decay": "beta2"} for s in STRATEGIES] + [PER_SAMPLE])
@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
def test_private_generators_draw_as_in_the_stock_run(tmp_path, settings, workers):
    runs = []
    for name, stock in (("a", True), ("b", False)):
        collator = SeededCollator()
        options = {"data": NoisyData(), "kwargs": {"data_collator": collator}, "max_steps": 4} | workers
        if stock:
            trainer = train(tmp_path / name, stock=True, **options)
        else:
            trainer, _ = record(tmp_path / name, erase=True, **settings, **options)
        runs.append((trainer, collator.seen))
    assert_equal_weights(runs[0][0], runs[1][0])
    if not workers:
        assert len(runs[0][1]) == len(runs[1][1])
        assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


class KeepsMetrics:
    """A compute_loss that logs, counts and stores, as preference trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics, self.num_calls = {"train": {"margin": []}}, 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.num_calls += 1
        self._metrics["train"]["margin"].append(float(loss))
        self.log({"inner": float(loss)})
        return loss


class TheirMetrics(KeepsMetrics, Trainer):
    pass


class OurMetrics(KeepsMetrics, V0InitTrainer):
    pass


@pytest.mark.parametrize("settings", [{"v0_init": s, "v0_decay": "beta2"} for s in STRATEGIES] + [PER_SAMPLE])
def test_metric_stores_counters_and_logs_hold_the_run_alone(tmp_path, settings):
    stock = train(tmp_path / "a", trainer_class=TheirMetrics, stock=True, max_steps=3)
    ours, _ = record(tmp_path / "b", erase=True, trainer_class=OurMetrics, max_steps=3, **settings)
    assert ours._metrics == stock._metrics and ours.num_calls == stock.num_calls == 3
    inner = [[entry["inner"] for entry in t.state.log_history if "inner" in entry] for t in (stock, ours)]
    assert inner[0] == inner[1] and len(inner[0]) == 3


@pytest.mark.parametrize("how", ["constructor", "add_callback"])
@pytest.mark.parametrize("strategy", ["data_driven", "first_gradient"])
def test_v0_is_of_the_weights_of_step_one_whoever_changes_them_before(tmp_path, how, strategy):
    class Rescale(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.transformer.wte.weight.mul_(20)

    recorder = Recorder()
    callbacks = [Rescale(), recorder] if how == "constructor" else [recorder]
    trainer = make_trainer(tmp_path, v0_init=strategy, v0_decay="beta2", max_steps=1, callbacks=callbacks)
    recorder.trainer = trainer
    if how == "add_callback":
        trainer.add_callback(Rescale())
    trainer.train()
    assert_v0_is_mean_square(recorder, 1)


def test_clipping_scales_v0_as_it_scales_what_adam_sees(tmp_path):
    _, free = record(
        tmp_path / "a",
        v0_init="data_driven",
        v0_decay="beta2",
        max_steps=1,
        max_grad_norm=0.0,
        model=make_gpt2(dropout=0.0),
    )
    norm = torch.cat([g.flatten() for g in free.gradients[0].values()]).norm().item()
    limit = norm / 10
    _, clipped = record(
        tmp_path / "b",
        v0_init="data_driven",
        v0_decay="beta2",
        max_steps=1,
        max_grad_norm=limit,
        model=make_gpt2(dropout=0.0),
    )
    for name, v0 in free.v0.items():
        torch.testing.assert_close(clipped.v0[name], v0 / 100, rtol=1e-4, atol=0.0)


# ---- what the Trainer is asked without a training ----------------------------------------------------------------------------


def test_batches_are_drawn_as_from_the_stock_trainer_before_any_training(tmp_path):
    counts = []
    for stock in (True, False):
        trainer = make_trainer(
            tmp_path, stock=stock, **({} if stock else {"v0_init": "data_driven", "v0_decay": "beta2"})
        )
        batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, trainer.args.device)
        counts.append(len(batches))
    assert counts == [2, 2]


@pytest.mark.parametrize("settings", [{"v0_init": s, "v0_decay": "beta2"} for s in STRATEGIES] + [PER_SAMPLE])
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
    with pytest.raises(InputError, match=r"DataParallel over 2 GPUs.*torchrun.*v0_estimator=minibatch"):
        write_trainers_v0(trainer, trainer.v0_arguments.resolve(), None)


def test_fp16_gradients_of_the_pass_are_divided_by_its_loss_scale(tmp_path, monkeypatch):
    """The pass multiplies an fp16 loss by 1024 against underflow; v0 must not know of it."""
    import hf_v0init.hook.per_sample as module

    plain = record(tmp_path / "a", model=make_gpt2(dropout=0.0), max_steps=1, **PER_SAMPLE)[1].v0
    trainer = make_trainer(tmp_path / "b", model=make_gpt2(dropout=0.0), max_steps=1, **PER_SAMPLE)
    monkeypatch.setattr(trainer.args, "fp16", True)
    scales = []
    original = module.estimate_grad_sq_mean
    monkeypatch.setattr(
        module, "estimate_grad_sq_mean", lambda *a, **k: (scales.append(k["loss_scale"]), original(*a, **k))[1]
    )
    recorder = Recorder()
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    trainer.train()
    assert scales == [1024.0]
    for name, v0 in plain.items():
        torch.testing.assert_close(recorder.v0[name], v0, rtol=1e-4, atol=1e-12)
