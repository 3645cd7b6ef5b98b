"""The trust radius through a Trainer: its own batches and loss, and a run that is the stock run afterwards."""

import pytest
import torch
from conftest import make_gpt2, make_sequences
from trainers import make_trainer, train, weights_of
from transformers import TrainerCallback

from hf_v0init import measure_trust_radius
from hf_v0init.trainer.trust_radius import measure_run


class Measure(TrainerCallback):
    """Measures when everything is prepared; `before` is the model as it was then."""

    def __init__(self) -> None:
        self.trainer, self.radius, self.before = None, None, None

    def on_train_begin(self, args, state, control, train_dataloader=None, model=None, **kwargs):
        self.before = {name: value.clone() for name, value in model.state_dict().items()}
        self.radius = measure_run(self.trainer, train_dataloader)


class WatchingTrainer:
    """Put before a Trainer: keeps the batches of the first steps, and counts losses as subclasses do."""

    def __init__(self, *args, **kwargs):
        self.num_losses, self._metrics, self.seen = 0, {"train": []}, []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.num_losses += 1
        self._metrics["train"].append(self.num_losses)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.seen.append([batch["input_ids"].clone() for batch in batches])
        return batches, num_items


def make_measured(folder, **options):
    from hf_v0init import V0InitTrainer

    watching = type("Watching", (WatchingTrainer, V0InitTrainer), {})
    measure = Measure()
    measure.trainer = make_trainer(folder, trainer_class=watching, callbacks=[measure], **options)
    measure.trainer.train()
    return measure


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_measured_run_is_the_stock_run_bit_for_bit(tmp_path, accumulation):
    """Weights after five steps with dropout, and the losses that a subclass counts."""
    options = {"gradient_accumulation_steps": accumulation}
    stock = train(tmp_path / "stock", stock=True, **options)
    measured = make_measured(tmp_path / "measured", **options)
    assert measured.radius.d50 is not None and measured.radius.num_backwards == 2 * accumulation
    expected = weights_of(stock)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(measured.trainer).items())
    assert measured.trainer.num_losses == len(measured.trainer._metrics["train"]) == 5 * accumulation


def test_it_looks_at_the_batches_of_the_first_two_steps(tmp_path):
    """The same number as `measure_trust_radius` gives for these batches, and for their micro-batches joined."""
    seen = []
    for accumulation, batch_size in ((1, 4), (2, 2)):
        measured = make_measured(
            tmp_path / str(accumulation),
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=batch_size,
        )
        steps = [torch.cat(micro_batches) for micro_batches in measured.trainer.seen]
        model = make_gpt2()
        model.load_state_dict(measured.before)
        again = measure_trust_radius(model, steps[-5:-3], lambda m, ids: m(input_ids=ids, labels=ids).loss)
        assert measured.radius.d50 == pytest.approx(again.d50, rel=1e-3)
        assert measured.radius.rho == pytest.approx(again.rho, abs=2e-3)
        seen.append(measured.radius.d50)
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)


def test_a_training_set_of_less_than_a_step_is_measured(tmp_path):
    """Three batches where a step takes four: the Trainer makes its step of three, and these are looked at."""
    few = {"data": make_sequences(6), "per_device_train_batch_size": 2, "max_steps": 1}
    measured = make_measured(tmp_path / "a", gradient_accumulation_steps=4, **few)
    assert measured.radius.num_backwards == 3
    whole = make_measured(tmp_path / "b", gradient_accumulation_steps=3, **few)
    assert measured.radius.d50 == pytest.approx(whole.radius.d50, rel=1e-3)
