"""Mode connectivity: known barriers, the mixtures themselves, checkpoints on disk, and a model that is left as it was."""

import numpy as np
import pytest
import torch
from conftest import make_gpt2
from safetensors.torch import save_file
from test_analysis_loss_landscape import WithEverything, assert_as_before, take_snapshot
from torch import nn
from translation_models import make_marian

from hf_v0init.analysis.batch_loss import make_batch_loss
from hf_v0init.analysis.mode_connectivity import Connectivity, compute_connectivity, compute_connectivity_along_training
from hf_v0init.analysis.weights import list_untrained, match_weights, read_weights
from hf_v0init.errors import InputError


class Point(nn.Module):
    """One weight vector; the loss is a function of it."""

    def __init__(self, size: int = 2, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=dtype))


def connect(one, other, function, **options):
    model = Point(len(one))
    weights = [{"w": torch.tensor(values, dtype=torch.float64)} for values in (one, other)]
    return compute_connectivity(model, *weights, lambda m: float(function(m.w)), show_progress=False, **options)


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
def test_everything_is_as_before_and_buffers_are_mixed(fails):
    model, other = WithEverything().train(), WithEverything()
    with torch.no_grad():
        for tensor in (*other.parameters(), other.norm.running_mean):
            tensor.add_(1.0)
    before, seen = take_snapshot(model), []

    def measure(model):
        assert not model.training
        seen.append((model.norm.running_mean.clone(), model.output.weight[1].clone()))
        if fails and len(seen) == 2:
            raise KeyboardInterrupt
        return 0.0

    # the model's own state_dict: its tensors are the ones that are overwritten on the way
    arguments = (model, model.state_dict(), other.state_dict(), measure)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            compute_connectivity(*arguments, num_points=3, show_progress=False)
    else:
        compute_connectivity(*arguments, num_points=3, show_progress=False)
        for share, (mean, row) in zip((0.0, 0.5, 1.0), seen, strict=True):
            assert mean.tolist() == pytest.approx([1.0 - share] * 5) and row.tolist() == pytest.approx(
                [1.0 - share] * 5
            )
    assert_as_before(model, before)


def test_along_training_reads_checkpoints(tmp_path):
    model, pairs, steps = Point(1), [], (1, 10, 100)
    for step in steps:
        pair = []
        for name, sign in (("a", 1.0), ("b", -1.0)):
            folder = tmp_path / name / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            save_file({"w": torch.tensor([sign * step**-0.5], dtype=torch.float64)}, folder / "model.safetensors")
            pair.append(folder)
        pairs.append((step, *pair))
    measure = lambda m: float(double_well(m.w))  # noqa: E731
    found = compute_connectivity_along_training(model, pairs, measure, num_points=5, show_progress=False)
    assert list(found) == list(steps)
    for step, curve in found.items():
        assert curve.barrier == pytest.approx(1.0 - (1.0 / step - 1.0) ** 2, abs=1e-12)
    assert not model.w.any()


def test_tied_and_sharded_checkpoints_of_a_transformers_model(tmp_path):
    one, other = make_gpt2(seed=0), make_gpt2(seed=1)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other", max_shard_size="5KB")
    assert (tmp_path / "other" / "model.safetensors.index.json").is_file()
    model, ids = make_gpt2(seed=2), torch.arange(1, 11)[None]
    sums = []

    def measure(model):
        sums.append(float(model(input_ids=ids, labels=ids).loss))
        return sums[-1]

    weights = [read_weights(tmp_path / name) for name in ("one", "other")]
    found = compute_connectivity(model, *weights, measure, num_points=3, show_progress=False)
    for end, network in ((0, other), (2, one)):
        assert found.errors[end] == measure(network.eval())
    with torch.no_grad():
        for p, q in zip(other.parameters(), one.parameters(), strict=True):
            p.add_(q).mul_(0.5)
    assert found.errors[1] == pytest.approx(measure(other), rel=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    model = Point(2)
    good = {"w": torch.zeros(2)}
    with pytest.raises(InputError, match="no tensor 'w'"):
        compute_connectivity(model, good, {"v": torch.zeros(2)}, lambda m: 0.0)
    with pytest.raises(InputError, match=r"shape \(3,\), the model \(2,\)"):
        compute_connectivity(model, {"w": torch.zeros(3)}, good, lambda m: 0.0)
    with pytest.raises(InputError, match="num_points=2"):
        compute_connectivity(model, good, good, lambda m: 0.0, num_points=2)
    with pytest.raises(InputError, match="no pairs"):
        compute_connectivity_along_training(model, [], lambda m: 0.0)
    with pytest.raises(InputError, match="step of its own"):
        compute_connectivity_along_training(model, [(1, "a", "b"), (1, "c", "d")], lambda m: 0.0)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(tmp_path)


def test_frozen_weights_that_nobody_saved_are_kept():
    model = Point(2)
    model.positions = nn.Parameter(torch.ones(3), requires_grad=False)
    assert list(match_weights(model, {"w": torch.zeros(2)})) == ["w"]
    model.positions.requires_grad_(True)
    with pytest.raises(InputError, match="positions"):
        match_weights(model, {"w": torch.zeros(2)})


def test_our_translation_checkpoints_connect_though_their_positions_are_computed_and_not_saved(tmp_path):
    """`from_pretrained` gives the positions back as if they were trained; both ends and the line have the sinusoids they began with."""
    models = [make_marian(seed=seed) for seed in (1, 2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    loaded = type(models[0]).from_pretrained(tmp_path / "0")
    name = "model.encoder.embed_positions.weight"
    assert name not in read_weights(tmp_path / "0") and loaded.get_parameter(name).requires_grad
    assert {name, name.replace("encoder", "decoder")} == list_untrained(loaded)
    tokens = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]])
    measure = make_batch_loss([{"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": tokens}])
    one, other = (read_weights(tmp_path / str(i)) for i in range(2))
    found = compute_connectivity(loaded, one, other, measure, num_points=3, show_progress=False)
    ends = [measure(model.eval()) for model in models]
    assert found.errors[-1] == pytest.approx(ends[0], rel=1e-5) and found.errors[0] == pytest.approx(ends[1], rel=1e-5)
    assert torch.equal(loaded.get_parameter(name), models[0].get_parameter(name))


def test_a_tied_weight_is_trained_though_one_of_its_names_is_not_saved():
    model = Point(2)
    model.tied = model.w
    model.alone = nn.Parameter(torch.ones(3))
    model._keys_to_ignore_on_save = ["tied", "alone"]
    assert list_untrained(model) == {"alone"}
