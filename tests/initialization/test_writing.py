"""An estimate of E[g^2]: saved, loaded, and written at several scales."""

import pytest
import torch
from torch import nn

from hf_v0init import InputError, read_second_moment
from hf_v0init.estimation.batches import SampleBatch
from hf_v0init.estimation.per_sample import GradSqMean, estimate_grad_sq_mean
from hf_v0init.initialization.plan import plan_v0
from hf_v0init.initialization.writing import write_v0
from hf_v0init.second_moment.state import SecondMoment


def make_model(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def make_plan(model):
    optimizer = torch.optim.AdamW(model.parameters())
    return optimizer, plan_v0(optimizer, model)


def compute_loss(model, x):
    return model(x).square().mean()


ROWS = torch.randn(9, 1, 3, generator=torch.Generator().manual_seed(1))


def estimate(plan, model) -> GradSqMean:
    batches = [SampleBatch(row, 1, k) for k, row in enumerate(ROWS)]
    return estimate_grad_sq_mean(
        plan.named_parameters, batches, lambda x: compute_loss(model, x), model=model, effective_batch_size=3
    )


def compute_expected(model) -> dict[str, torch.Tensor]:
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.dim() >= 2}
    for row in ROWS:
        model.zero_grad()
        compute_loss(model, row).backward()
        for name, p in model.named_parameters():
            if name in total:
                total[name] += p.grad.square() / len(ROWS)
    model.zero_grad()
    return total


def test_an_estimate_is_saved_loaded_and_written_at_several_scales(tmp_path):
    model = make_model()
    _, plan = make_plan(model)
    made, expected = estimate(plan, model), compute_expected(model)
    made.save(tmp_path / "estimate.safetensors")
    loaded = GradSqMean.load(tmp_path / "estimate.safetensors")
    assert (loaded.num_samples, loaded.num_batches) == (9, 9)
    assert loaded.measured_ratio == made.measured_ratio > 1.0
    for scale in (0.25, 1.0, 8.0):
        optimizer, other = make_plan(model)
        report = write_v0(other, loaded, scale, seed=4)
        for name, p in model.named_parameters():
            v0 = read_second_moment(optimizer, p)
            assert (v0 is None) == (name not in expected)
            if v0 is not None:
                assert (
                    set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
                    and not optimizer.state[p]["exp_avg"].any()
                )
                torch.testing.assert_close(v0, scale * expected[name], rtol=1e-5, atol=1e-12)
                assert torch.equal(v0, loaded.tensors[name] * scale)
        assert report.measured_ratio == pytest.approx(scale * made.measured_ratio)
        assert (report.scale, report.seed, report.num_samples, report.estimator) == (scale, 4, 9, "per_sample")


def test_writing_the_fresh_estimate_is_writing_the_loaded_one(tmp_path):
    model = make_model()
    first, plan = make_plan(model)
    made = estimate(plan, model)
    made.save(tmp_path / "estimate")
    write_v0(plan, made, 2.0)
    second, other = make_plan(model)
    write_v0(other, GradSqMean.load(tmp_path / "estimate"), 2.0)
    for p in (model[0].weight, model[2].weight):
        assert torch.equal(read_second_moment(first, p), read_second_moment(second, p))
        assert not first.state[p]["exp_avg"].any()
    with pytest.raises(InputError, match="parameters already have optimizer state"):
        write_v0(plan, GradSqMean.load(tmp_path / "estimate"), 1.0)


def test_each_group_by_its_own_beta2():
    model = make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "betas": (0.9, 0.9)}]
    optimizer = torch.optim.AdamW(groups)
    plan, expected = plan_v0(optimizer, model), compute_expected(model)
    write_v0(plan, estimate(plan, model), lambda beta2: 10 * beta2)
    for name, factor in (("0.weight", 9.99), ("2.weight", 9.0)):
        v0 = read_second_moment(optimizer, model.get_parameter(name))
        torch.testing.assert_close(v0, factor * expected[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("2.weight"), "has no parameter|has no.*'2.weight'"),
        (lambda tensors: tensors.update({"2.weight": torch.ones(2, 5)}), r"shape \(2, 5\) for parameter '2.weight'"),
        (lambda tensors: tensors["2.weight"].fill_(float("nan")), "'2.weight' is not finite"),
    ],
)
def test_an_estimate_that_does_not_fit_is_refused_and_nothing_is_written(change, words):
    model = make_model()
    optimizer, plan = make_plan(model)
    tensors = compute_expected(model)
    change(tensors)
    with pytest.raises(InputError, match=words):
        write_v0(plan, GradSqMean(tensors, 9, 9), 1.0)
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file at all"])
def test_a_file_that_holds_no_estimate_is_refused_in_words(tmp_path, content):
    path = tmp_path / "estimate"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"holds no estimate of E\[g\^2\].*write one with GradSqMean.save"):
        GradSqMean.load(path)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adagrad])
def test_what_fails_halfway_leaves_the_optimizer_as_it_was(monkeypatch, error, optimizer_class):
    model = make_model()
    optimizer = optimizer_class(model.parameters())
    plan = plan_v0(optimizer, model)
    before = {p: dict(state) for p, state in optimizer.state.items()}
    original, calls = SecondMoment.change, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error("no memory")
        original(*args)

    monkeypatch.setattr(SecondMoment, "change", failing)
    with pytest.raises(error, match="no memory"):
        write_v0(plan, GradSqMean(compute_expected(model), 9, 9), 1.0)
    assert plan.moments.is_untouched()
    assert {p: dict(state) for p, state in optimizer.state.items()} == before
    monkeypatch.undo()
    write_v0(plan, GradSqMean(compute_expected(model), 9, 9), 1.0)
    assert len(calls) == 2 and not plan.moments.is_untouched()


def test_a_model_in_shards_is_refused():
    moments = SecondMoment(torch.optim.AdamW(make_model().parameters()))
    moments.zero = object()
    with pytest.raises(InputError, match=r"under DeepSpeed ZeRO is not supported.*v0_estimator=minibatch"):
        plan_v0(moments, make_model())


def test_parameters_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(InputError, match="'weight' is on the meta device"):
        plan_v0(torch.optim.AdamW(model.parameters()), model)
