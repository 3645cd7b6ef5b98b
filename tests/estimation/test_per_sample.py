"""The estimate of E[g^2] from batches against fp64 gradients; `tests/loop/test_plain_loop.py` has single samples, and what is left alone."""

import pytest
import torch
from reference import per_sample_gradients
from torch import nn

from hf_v0init import InputError
from hf_v0init.estimation import per_sample
from hf_v0init.estimation.per_sample import compute_grad_sq_mean, estimate_grad_sq_mean


class Regression(nn.Module):
    """Two layers, one of them used twice, with dropout and a frozen one between."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(5, 1)
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.first(self.first(x)))  # used twice, as tied weights are
        return self.last(self.frozen(self.dropout(x)))


def mean_loss(model, inputs):
    x, y = inputs
    return (model(x) - y).square().mean()


def make_data(num: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 5, generator=generator), torch.randn(num, 1, generator=generator)


def make_batches(x, y, sizes) -> list[tuple]:
    return [((x[i], y[i]), len(i)) for i in torch.arange(len(x)).split(sizes)]


def estimate(model, batches, loss=mean_loss, **options):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return estimate_grad_sq_mean(named, batches, lambda inputs: loss(model, inputs), model=model, **options)


def test_batches_of_any_sizes_give_mean_square_plus_the_spread_between_them():
    """The formula at the head of the file, in fp64, from the gradients of the batches."""
    torch.manual_seed(0)
    model = Regression()
    x, y = make_data(23)
    sizes = [4, 4, 4, 4, 4, 3]
    batches = make_batches(x, y, sizes)
    exact = per_sample_gradients(model, [inputs for inputs, _ in batches], mean_loss)
    made, _ = estimate(model, batches)
    n = torch.tensor(sizes, dtype=torch.float64)
    for name, g in exact.items():
        n_like = n.view(-1, *[1] * (g.dim() - 1))
        mean = (n_like * g).sum(0) / 23
        variance = (n_like * (g - mean).square()).sum(0) / 5
        expected = mean.square() + variance * (1 - 1 / 23)
        torch.testing.assert_close(made[name].double(), expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_batches_estimate_the_mean_square_of_the_gradient_of_any_batch_size(batch_size):
    """i.i.d. g ~ N(mu, s^2): E[g_B^2] = mu^2 + s^2 / B."""
    generator = torch.Generator().manual_seed(0)
    g = 0.5 + 2.0 * torch.randn(50_000, generator=generator, dtype=torch.float64)
    batches = g.view(-1, 4).mean(1)
    grad_sum, grad_sq_sum = 4 * batches.sum(), 4 * batches.square().sum()
    made = compute_grad_sq_mean(grad_sum, grad_sq_sum, 50_000, 12_500, batch_size)
    assert made.item() == pytest.approx(0.25 + 4.0 / batch_size, rel=0.05)


def test_a_batch_larger_than_the_samples_gives_the_squared_mean_and_never_less_than_zero():
    grad_sum, grad_sq_sum = torch.tensor([10.0, 0.0]), torch.tensor([30.0, 5.0])
    assert compute_grad_sq_mean(grad_sum, grad_sq_sum, 10, 10, 1000).tolist() == [1.0, 0.0]
    rounded = compute_grad_sq_mean(torch.tensor([10.0]), torch.tensor([9.999]), 10, 10)
    assert rounded.tolist() == [1.0]  # a spread below zero is rounding


def test_dropout_of_a_batch_is_its_own_by_seed_and_place_in_the_whole_pass(monkeypatch):
    torch.manual_seed(0)
    model = Regression(dropout=0.5)
    batches = make_batches(*make_data(24), [4] * 6)
    losses = []

    def loss(model, inputs):
        value = mean_loss(model, inputs)
        losses.append(value.item())
        return value

    estimate(model, batches, loss, seed=5)
    estimate(model, batches, loss, seed=6)
    assert losses[6:] != losses[:6]
    for rank in range(2):
        monkeypatch.setattr(per_sample, "get_rank_and_world_size", lambda rank=rank: (rank, 2))
        estimate(model, batches[rank::2], loss, seed=5)
    assert losses[12:] == losses[:6:2] + losses[1:6:2]


def test_narrow_gradients_are_summed_in_fp32_and_a_loss_scale_is_divided_out():
    """1,250 equal gradients of 1/3: a bf16 running sum stops growing at 128."""
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    x = torch.full((1, 4), 1 / 3, dtype=torch.bfloat16)
    for scale in (1.0, 1024.0):
        made = estimate(model, [(x, 1)] * 1250, lambda model, x: model(x).sum(), loss_scale=scale)[0]["weight"]
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, torch.full((4, 4), x[0, 0].item() ** 2), rtol=1e-4, atol=0)


def test_repetitions_and_batches_without_a_target_are_run_but_neither_counted_nor_summed():
    torch.manual_seed(0)
    model, (x, y), run = Regression(), make_data(20), []
    batches = [({"x": x[i], "y": y[i], "labels": torch.tensor([3])}, 4) for i in torch.arange(20).split(4)]
    batches[2][0]["labels"][0] = batches[4][0]["labels"][0] = -100

    def loss(model, inputs):
        run.append(1)
        return mean_loss(model, (inputs["x"], inputs["y"])) * (
            float("nan") if len(run) == 3 else 1.0
        )  # as over no label

    sizes = [4, 0, 4, 4, 0]
    made, numbers = estimate(model, [(inputs, size) for (inputs, _), size in zip(batches, sizes, strict=True)], loss)
    assert len(run) == 5
    assert [numbers[f"num_{name}"] for name in ("samples", "batches", "skipped")] == [8, 2, 4]
    alone, others = estimate(model, [batches[0], batches[3]], loss)
    assert others["mean_loss"] == numbers["mean_loss"]
    assert all(torch.equal(tensor, alone[name]) for name, tensor in made.items())


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"labels": torch.tensor([[1, -100], [2, -100]])}, False),  # the first of a row is no target of a causal loss
        ({"labels": torch.tensor([[1, -100], [2, 3]])}, True),
        ({"labels": torch.tensor([-100, -100])}, False),
        ({"labels": torch.tensor([-100, 4])}, True),
        ({"labels": torch.tensor([[-100], [5]])}, True),
        ({"labels": torch.tensor([0.0, 1.0])}, True),
        ({"x": torch.zeros(2)}, True),
        ((torch.zeros(2),), True),
    ],
)
def test_a_batch_without_any_target_is_told(inputs, expected):
    assert per_sample.has_targets(inputs) is expected


def test_a_shared_module_under_reentrant_checkpointing_is_the_plain_one():
    """Its gradient arrives in two parts, and only their sum has the square that is meant."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = Regression()

    def loss(module, inputs):
        x, y = inputs
        x = x.requires_grad_(True)
        h = checkpoint(module.first, x, use_reentrant=True)
        h = torch.tanh(checkpoint(module.first, h, use_reentrant=True))
        return (module.last(module.frozen(h)) - y).square().mean()

    batches = make_batches(*make_data(8), [1] * 8)
    plain, saved = estimate(model, batches)[0], estimate(model, batches, loss)[0]
    for name, tensor in plain.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-12)


def test_a_forward_that_changes_trained_weights_is_refused_and_names_them():
    class Normalised(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.div_(self.weight.norm())
            return super().forward(x)

    with pytest.raises(InputError, match=r"forward changes its own weights \('weight'\).*v0_estimator=minibatch"):
        estimate(Normalised(3, 2), [(torch.randn(2, 3), 2)], lambda m, x: m(x.clone()).square().mean())


def test_the_sums_and_the_estimate_take_two_tensors_a_parameter():
    """Bytes of live tensors of the parameter's size before each batch: the weight and the two sums."""
    import gc

    size, alive = 301, []
    model = nn.Linear(size, size, bias=False)
    x = torch.randn(4, size)

    def make_batches():
        for _ in range(3):
            gc.collect()
            tensors = (o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.numel() == size * size)
            alive.append(len({o.untyped_storage().data_ptr() for o in tensors}))
            yield (x, x), 4

    estimate(model, make_batches())
    assert alive == [3, 3, 3]
    assert model.weight.grad is None
