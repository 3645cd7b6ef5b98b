"""`measure_run`: the trust radius of a run that is not made, with the Trainer's own batch and loss."""

import pytest
import torch
from conftest import make_gpt2, make_sequences
from trainers import make_trainer, train, weights_of

from hf_v0init import InputError, measure_trust_radius
from hf_v0init.trainer.probe import measure_run


def test_it_is_what_the_run_itself_measures_and_no_update_is_made(tmp_path):
    options = {"learning_rate": 0.02, "gradient_accumulation_steps": 2, "max_steps": 8}
    trainer = make_trainer(tmp_path / "a", **options)
    before = weights_of(trainer)
    radius, rate = measure_run(trainer)
    assert rate == 0.02 and all(torch.equal(w, before[name]) for name, w in weights_of(trainer).items())
    assert not trainer.optimizer.state and "compute_loss" not in vars(trainer)
    assert radius.d50 is not None and radius.num_forwards == radius.to_dict()["num_forwards"]
    length = train(tmp_path / "b", untuned_warmup="trust_radius", **options).get_v0_report()["length"]
    assert (length["d50"], length["num_forwards"]) == (radius.d50, radius.num_forwards)


@pytest.mark.parametrize("max_norm", [0.0, 0.01])
def test_it_is_that_of_measure_trust_radius_on_the_same_batch(tmp_path, max_norm):
    """Eight sequences: one batch is all the data, in whatever order; clipping scales the gradient and not the radius."""
    data = make_sequences(8)
    model = make_gpt2(dropout=0.0)
    options = {"data": data, "per_device_train_batch_size": 8, "max_steps": 2, "max_grad_norm": max_norm}
    radius, _ = measure_run(make_trainer(tmp_path, model=model, **options))
    rows = torch.stack([row["input_ids"] for row in data])
    again = measure_trust_radius(
        make_gpt2(dropout=0.0), [rows], lambda m, ids: m(input_ids=ids, labels=ids).loss * 9 / 10
    )
    assert radius.d50 == pytest.approx(again.d50, rel=0.02)


def test_a_run_without_a_gradient_has_none(tmp_path):
    model = make_gpt2()
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    trainer.compute_loss = lambda model, inputs, **_: 0.0 * model(**inputs).loss
    with pytest.raises(InputError, match="no step of the run had a gradient"):
        measure_run(trainer)
