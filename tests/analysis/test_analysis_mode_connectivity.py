"""Mode connectivity: known barriers, the mixtures themselves, checkpoints on disk, and a model that is left as it was."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_gpt2
from test_analysis_loss_landscape import WithEverything, assert_as_before, take_snapshot
from torch import nn
from translation_models import make_marian

from hf_v0init.analysis.checkpoint_loss import load_model, make_batch_loss
from hf_v0init.analysis.mode_connectivity import Connectivity, compute_connectivity
from hf_v0init.errors import InputError


class Point(nn.Module):
    """One weight vector; the loss is a function of it."""

    def __init__(self, *values: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def connect(one, other, function, **options):
    return compute_connectivity(Point(*one), Point(*other), lambda m: float(function(m.w)), **options)


def quadratic(w):
    return (torch.tensor([2.0, 5.0]) * (w - 0.3).square()).sum()


def double_well(w):
    return (w.square() - 1.0).square().sum()


def test_convex_quadratic_has_no_barrier():
    # two points of equal loss on opposite sides of the minimum: all between is lower
    found = connect([1.3, 0.3], [-0.7, 0.3], quadratic)
    assert found.errors[0] == pytest.approx(2.0) and found.errors[-1] == pytest.approx(2.0)
    assert found.barrier <= 1e-12 and found.barrier_above_line <= 1e-12
    assert found.errors[5] == pytest.approx(0.0, abs=1e-12)


def test_unequal_ends_of_a_convex_loss_have_half_the_difference():
    found = connect([0.3, 0.3], [1.3, 1.3], quadratic)
    assert found.barrier == pytest.approx(7.0 / 2)
    assert found.barrier_above_line == pytest.approx(0.0, abs=1e-12)


def test_double_well_has_the_known_barrier():
    found = connect([1.0], [-1.0], double_well)
    assert found.barrier == pytest.approx(1.0)  # (0 - 1)^2 in the middle, 0 at both ends
    assert found.barrier_above_line == pytest.approx(1.0)
    expected = [((2 * a - 1) ** 2 - 1) ** 2 for a in np.linspace(0, 1, 11)]
    assert found.errors == pytest.approx(expected, abs=1e-12)
    # in two dimensions both wells are crossed at once
    assert connect([1.0, -1.0], [-1.0, 1.0], double_well).barrier == pytest.approx(2.0)


def test_share_one_is_the_first_checkpoint():
    found = connect([3.0], [1.0], lambda w: w.sum(), num_points=5)
    assert found.shares.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found.errors.tolist() == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])


def test_an_error_that_is_not_a_number_shows():
    assert np.isnan(Connectivity(np.array([0.0, 0.5, 1.0]), np.array([1.0, np.nan, 1.0])).barrier)


@pytest.mark.parametrize("fails", [False, True])
def test_both_models_are_as_before_and_buffers_are_mixed(fails):
    models = [WithEverything().train(), WithEverything().train()]
    with torch.no_grad():
        for tensor in (*models[1].parameters(), models[1].norm.running_mean):
            tensor.add_(1.0)
    before, seen = [take_snapshot(model) for model in models], []

    def measure(model):
        assert not model.training
        seen.append((model.norm.running_mean.clone(), model.output.weight[1].clone()))
        torch.rand(3)
        if fails and len(seen) == 2:
            raise KeyboardInterrupt
        return 0.0

    if fails:
        with pytest.raises(KeyboardInterrupt):
            compute_connectivity(*models, measure, num_points=3)
    else:
        compute_connectivity(*models, measure, num_points=3)
        for share, (mean, row) in zip((0.0, 0.5, 1.0), seen, strict=True):
            assert mean.tolist() == pytest.approx([1.0 - share] * 5)
            assert row.tolist() == pytest.approx([1.0 - share] * 5)
    for model, snapshot in zip(models, before, strict=True):
        assert_as_before(model, snapshot)


def test_tied_and_sharded_checkpoints_of_a_transformers_model(tmp_path):
    make_gpt2(seed=0).save_pretrained(tmp_path / "one")
    make_gpt2(seed=1).save_pretrained(tmp_path / "other", max_shard_size="5KB")
    assert (tmp_path / "other" / "model.safetensors.index.json").is_file()
    one, other = (load_model(tmp_path / name) for name in ("one", "other"))
    ids = torch.arange(1, 11)[None]

    def measure(model):
        device_ids = ids.to(model.device)
        return float(model(input_ids=device_ids, labels=device_ids).loss)

    found = compute_connectivity(one, other, measure, num_points=3)
    assert (found.errors[0], found.errors[2]) == (measure(other), measure(one))
    with torch.no_grad():
        for p, q in zip(other.parameters(), one.parameters(), strict=True):
            p.add_(q).mul_(0.5)
    assert found.errors[1] == pytest.approx(measure(other), rel=1e-5)


def test_two_architectures_are_refused():
    for other in (Point(1.0, 2.0, 3.0), nn.Linear(2, 2)):
        with pytest.raises(InputError, match="one architecture"):
            compute_connectivity(Point(1.0, 2.0), other, lambda m: 0.0)


def test_our_translation_checkpoints_connect_though_their_positions_are_computed_and_not_saved(tmp_path):
    """Both ends and the line have the sinusoids they began with."""
    for i in (0, 1):
        make_marian(seed=i + 1).save_pretrained(tmp_path / str(i))
    one, other = (load_model(tmp_path / str(i)) for i in (0, 1))
    name = "model.encoder.embed_positions.weight"
    assert torch.equal(one.get_parameter(name), other.get_parameter(name))
    tokens = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]])
    batch = {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": tokens}
    measure = make_batch_loss([batch], shifts_labels=False)
    found = compute_connectivity(one, copy.deepcopy(other), measure, num_points=3)
    assert (found.errors[-1], found.errors[0]) == pytest.approx((measure(one), measure(other)), rel=1e-5)
