"""`initialize_v0` for loops without a Trainer: the Trainer's numbers, the oracle's numbers, and nothing else touched."""

import contextlib
import random

import numpy as np
import pytest
import torch
from conftest import make_gpt2, make_sequences
from launched import initialize_plainly
from processes import launch
from reference import per_sample_gradients
from snapshots import assert_same, take_snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import record

from hf_v0init import InputError, compute_scale_for_warmup, initialize_v0, read_second_moment
from hf_v0init.records.report import V0Report
from hf_v0init.trainer.per_sample import choose_samples


class Network(nn.Module):
    """What could be disturbed: BatchNorm, dropout, a weight used twice."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = True):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        return self.last(self.dropout(self.norm(torch.tanh(self.first(self.first(x))))))


def mean_square(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def make_data(num: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(num, 5, generator=generator), torch.randn(num, 1, generator=generator))


def make_network(**options) -> Network:
    torch.manual_seed(0)
    return Network(**options)


def make_adam(model, **options) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=1e-2, **options)


def run(model, batches, loss_fn=mean_square, *, optimizer=None, **options) -> tuple[V0Report, dict[str, torch.Tensor]]:
    """The report, and the second moments that there are."""
    optimizer = make_adam(model) if optimizer is None else optimizer
    report = initialize_v0(optimizer, model=model, batches=batches, loss_fn=loss_fn, **options)
    return report, read_all(optimizer, model)


def read_all(optimizer, model) -> dict[str, torch.Tensor]:
    moments = {name: read_second_moment(optimizer, p) for name, p in model.named_parameters()}
    return {name: v.clone() for name, v in moments.items() if v is not None}


def stack(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def token_loss(model, batch):
    """The loss as the Trainer computes it, which counts every label."""
    return model(**batch, num_items_in_batch=batch["labels"].ne(-100).sum()).loss


# ---- the numbers ----------------------------------------------------------------------------------------------------


def test_the_pass_is_the_trainers(tmp_path):
    """With dropout, for the samples that the Trainer chooses, in its batches; but for rounding."""
    options = {"v0_num_samples": 30, "v0_stats_batch_size": 3, "v0_estimator": "per_sample", "v0_scale": 2.0}
    trainer, recorder = record(tmp_path, v0_init="data_driven", max_steps=1, **options)
    rows, model = make_sequences(), make_gpt2()
    chosen = [rows[i] for i in choose_samples(len(rows), 30, 11)]
    batches = [stack(chosen[start : start + 3]) for start in range(0, 30, 3)]
    report, moments = run(model, batches, token_loss, v0_seed=11, v0_scale=2.0, effective_batch_size=4)
    assert moments.keys() == recorder.v0.keys()
    for name, v0 in recorder.v0.items():
        torch.testing.assert_close(moments[name], v0, rtol=1e-5, atol=1e-6 * float(v0.max()))
    theirs = trainer.get_v0_report()
    for key in ("v0_mean", "measured_ratio", "mean_loss", "num_samples", "num_batches", "effective_batch_size"):
        assert getattr(report, key) == pytest.approx(theirs[key], rel=1e-5), key


def test_equals_the_oracle_for_single_samples():
    data, model = make_data(25), make_network(batch_norm=False)
    exact = per_sample_gradients(model, [data[i : i + 1] for i in range(25)], mean_square)
    options = {"v0_scale": 0.5, "effective_batch_size": 10, "v0_include_bias_and_norm": True}
    (report, moments), ratios = run(model, DataLoader(data, 1), **options), []
    for name, g in exact.items():
        v0 = moments[name]
        torch.testing.assert_close(v0.double(), 0.5 * g.square().mean(0), rtol=1e-4, atol=1e-9)
        # of a step of 10 of these 25 samples: (A/N)^2 + s^2 (1/B - 1/N)
        of_step = g.mean(0).square() + g.var(0, unbiased=True) * (1 / 10 - 1 / 25)
        ratios.append((v0 / of_step).flatten())
    assert report.measured_ratio == pytest.approx(float(torch.cat(ratios).median()), rel=1e-3)


def test_each_group_by_its_own_beta2():
    data, model = make_data(25), make_network(batch_norm=False)
    exact = per_sample_gradients(model, [data[i : i + 1] for i in range(25)], mean_square)
    groups = [{"params": model.first.parameters()}, {"params": model.last.parameters(), "betas": (0.9, 0.9)}]
    _, moments = run(model, DataLoader(data, 1), optimizer=torch.optim.AdamW(groups), v0_decay_steps=20)
    for name, beta2 in (("first.weight", 0.999), ("last.weight", 0.9)):
        expected = compute_scale_for_warmup(20, beta2) * exact[name].square().mean(0)
        torch.testing.assert_close(moments[name].double(), expected, rtol=1e-4, atol=1e-9)


# ---- how far it reads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_samples", "num_batches"), [(1, 1), (8, 2), (9, 3), (None, 5)])
def test_reads_no_further_than_needed(num_samples, num_batches):
    """A stream that can be read once goes on where the pass stopped."""
    model = make_network(batch_norm=False)
    stream = iter(make_data(20)[i : i + 4] for i in range(0, 20, 4))
    if num_batches == 1:
        with pytest.raises(InputError, match="their spread is not known"):
            run(model, stream, v0_num_samples=num_samples)
    else:
        report, _ = run(model, stream, v0_num_samples=num_samples)
        assert (report.num_batches, report.num_samples) == (num_batches, 4 * num_batches)
        assert (report.stats_batch_size, report.effective_batch_size) == (4, 4.0)
    assert len(list(stream)) == 5 - num_batches


def test_counts_samples_by_the_first_tensor():
    model = make_network(batch_norm=False)
    rows = [{"rows": make_data(6)[i : i + 2], "text": ["a", "b"]} for i in range(0, 6, 2)]
    report, _ = run(model, rows, lambda network, batch: mean_square(network, batch["rows"]))
    assert report.num_samples == 6


# ---- what is left alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_training", [True, False])
def test_all_else_is_as_before_also_after_an_exception(is_training, error):
    model, other = make_network(dropout=0.3).train(is_training), nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    other[0].bias.requires_grad_(False)
    for network in (model, other):
        network(torch.randn(6, 5)).sum().backward()
    model.norm.eval()
    gradients, modes = model.last.weight.grad, []

    def loss_fn(network, batch):
        random.random(), np.random.rand(), torch.rand(1)
        modes.append((network.training, network.norm.training, network.dropout.training))
        loss = mean_square(network, (other(batch[0]), batch[1]))
        if error is not None and len(modes) == 3:
            raise error
        return loss

    loader = DataLoader(make_data(24), 4, shuffle=True)
    before, optimizer = take_snapshot(model, other), make_adam(model)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        initialize_v0(optimizer, model=model, batches=loader, loss_fn=loss_fn, other_modules=[other])
    assert len(optimizer.state) == (2 if error is None else 0)
    assert_same(take_snapshot(model, other), before)
    assert model.last.weight.grad is gradients
    assert set(modes) == {(True, not is_training, True)}  # parts in evaluation mode stay so, a whole model does not


@pytest.mark.parametrize("kind", ["global", "own generator", "accelerate", "accelerate seedable"])
def test_the_order_of_a_loader_is_kept(kind, make_accelerator):
    def read_two_epochs(look: bool) -> list:
        generator = torch.Generator().manual_seed(4) if kind == "own generator" else None
        loader = DataLoader(make_data(12), 3, shuffle=True, generator=generator)
        model = make_network()
        optimizer = make_adam(model)
        if kind.startswith("accelerate"):
            from accelerate.utils import DataLoaderConfiguration

            config = DataLoaderConfiguration(use_seedable_sampler=kind.endswith("seedable"))
            accelerator = make_accelerator(dataloader_config=config)
            loader, model, optimizer = accelerator.prepare(loader, model, optimizer)
        torch.manual_seed(7)
        if look:
            initialize_v0(optimizer, model=model, batches=loader, loss_fn=mean_square, v0_num_samples=look)
        order = [batch[0] for _ in range(2) for batch in loader]
        if kind.startswith("accelerate"):
            assert accelerator.gradient_state.dataloader_references == [None]
        return order

    stock = read_two_epochs(look=None)
    for num_samples in (6, 12):
        assert_same(read_two_epochs(look=num_samples), stock)


def test_a_loss_through_another_network_gives_the_models_gradients_alone():
    generator, critic = make_network(batch_norm=False), nn.Linear(1, 1)

    def loss_fn(network, batch):
        return -critic(network(batch)).mean()

    noise = torch.randn(10, 5)
    _, moments = run(generator, noise.split(1), loss_fn, other_modules=[critic], v0_num_samples=None)
    exact = per_sample_gradients(generator, list(noise.split(1)), lambda network, z: -critic(network(z)).mean())
    for name in ("first.weight", "last.weight"):
        torch.testing.assert_close(moments[name].double(), exact[name].square().mean(0), rtol=1e-5, atol=1e-12)


# ---- accelerate and processes --------------------------------------------------------------------------------------------


def test_an_optimizer_prepared_by_accelerate_with_accumulation(make_accelerator):
    accelerator = make_accelerator(gradient_accumulation_steps=3)
    model, loader = make_network(batch_norm=False), DataLoader(make_data(24), 4)
    plain, v0 = run(model, loader, effective_batch_size=12)
    model, optimizer, loader = accelerator.prepare(model, make_adam(model), loader)
    accelerated, same = run(model, loader, optimizer=optimizer, accelerator=accelerator)
    assert plain.effective_batch_size == accelerated.effective_batch_size == 12.0
    assert plain.measured_ratio == accelerated.measured_ratio > 1.0
    assert_same(v0, same)


def test_half_precision_of_accelerate_is_that_of_the_loop(make_accelerator):
    moments, dtypes = [], []
    for accelerator in (make_accelerator(mixed_precision="bf16"), None):
        inner = model = make_network(batch_norm=False)
        inner.last.register_forward_hook(lambda m, i, output: dtypes.append(output.dtype))
        optimizer = make_adam(model)
        if accelerator is not None:
            model, optimizer = accelerator.prepare(model, optimizer)
        run(model, DataLoader(make_data(24), 4), optimizer=optimizer, accelerator=accelerator)
        moments.append(read_second_moment(optimizer, inner.last.weight))
    assert dtypes == [torch.bfloat16] * 6 + [torch.float32] * 6
    torch.testing.assert_close(*moments, rtol=5e-2, atol=1e-4)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What tests/launched/initialize_plainly.py wrote on two gloo processes, by rank."""
    folder = tmp_path_factory.mktemp("processes")
    launch("launched/initialize_plainly.py", 2, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", ["data_driven", "uneven"])
def test_two_processes_are_as_one(launched, make_accelerator, case):
    one = initialize_plainly.run(make_accelerator(), "ddp", initialize_plainly.CASES[case])
    for rank in range(2):
        two = launched[rank]["ddp"][case]
        assert two["v0"].keys() == one["v0"].keys()
        for name, v0 in one["v0"].items():
            torch.testing.assert_close(two["v0"][name], v0, rtol=1e-5, atol=1e-5 * float(v0.max()))
        for key in ("num_samples", "num_batches", "effective_batch_size"):
            assert two["report"][key] == one["report"][key], key
        assert two["report"]["num_processes"] == 2
    assert_same(launched[0]["ddp"][case]["v0"], launched[1]["ddp"][case]["v0"])


@pytest.mark.parametrize("case", list(initialize_plainly.ATTACHED))
@pytest.mark.parametrize("kind", ["ddp", "fully_shard"])
def test_v0_of_the_first_steps_is_the_same_on_two_processes(launched, make_accelerator, kind, case):
    """And so are the weights after twelve steps of the same batches; random v0 bit for bit."""
    one = initialize_plainly.run_attached(make_accelerator(), "ddp", initialize_plainly.ATTACHED[case])
    for rank in range(2):
        two = launched[rank][kind]["attached"][case]
        assert two["v0"].keys() == one["v0"].keys() == {"0.weight", "2.weight"}
        for name, v0 in one["v0"].items():
            tolerance = 0.0 if case == "random" else 2e-5
            torch.testing.assert_close(two["v0"][name], v0, rtol=tolerance, atol=tolerance * float(v0.max()))
        for name, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-5)
        assert (two["length"] is None) == (one["length"] is None) == (case != "linear measured")
        if one["length"] is not None:
            assert two["length"]["steps"] == one["length"]["steps"] == 8  # two thirds of the run
            assert two["length"]["d50"] == pytest.approx(one["length"]["d50"], rel=1e-3)
            assert two["length"]["d50"] == launched[1 - rank][kind]["attached"][case]["length"]["d50"]
        for key, tolerance in (("measured_ratio", 1e-4), ("v0_mean", 1e-5)):
            expected = one["report"][key]  # None: not measured
            expected = None if expected is None else pytest.approx(expected, rel=tolerance)
            assert two["report"][key] == expected, key
        assert two["report"]["num_processes"] == 2


@pytest.mark.parametrize("kind", ["ddp", "fully_shard"])
def test_two_processes_measure_the_trust_radius_of_one(launched, make_accelerator, kind):
    one = initialize_plainly.measure(make_accelerator(), "ddp")
    first, second = (launched[rank][kind]["radius"] for rank in range(2))
    assert (first["d50"], first["rho"]) == (second["d50"], second["rho"])  # of one mind, bit for bit
    assert first["d50"] == pytest.approx(one["d50"], rel=1e-3) and first["rho"] == pytest.approx(one["rho"], abs=2e-3)
    assert first["unchanged"] and second["unchanged"]


def test_an_exception_on_one_process_is_raised_on_all(launched):
    errors = [launched[rank]["errors"] for rank in range(2)]
    assert errors[0]["fails"].startswith("RuntimeError: process 1: disk full")
    assert errors[1]["fails"].startswith("RuntimeError: disk full")
    assert [error["data"] for error in errors] == [
        "RuntimeError: process 1: cannot read batch 2", "OSError: cannot read batch 2"
    ]  # fmt: skip
    for rank in range(2):
        assert "runs the model inside DDP" in errors[rank]["wrapped"]
        assert errors[rank]["num_states"] == 0
        assert "bad batch here" in errors[rank]["radius"]["error"] and errors[rank]["radius"]["unchanged"]
        assert "disk full on this one" in errors[rank]["measures"] and errors[rank]["unchanged"]


@pytest.mark.parametrize("kind", ["fully_shard", "tensor_parallel"])
def test_sharded_models_are_refused(launched, kind):
    for rank in range(2):
        words = launched[rank]["errors"][kind]
        assert words.startswith("InputError: v0_estimator=per_sample under FSDP2 or tensor parallelism")
        assert "v0_estimator=minibatch" in words


# ---- refusals --------------------------------------------------------------------------------------------------------


BAD = [
    ({"v0_scale": -1.0}, "v0_scale=-1|scale=-1"),
    ({"v0_decay_steps": 0.3}, "v0_decay_steps=0.3"),
    ({"batches": []}, "batches is empty"),
    ({"batches": [make_data(8)[:]]}, "the 8 samples .* at most 4"),
    ({"loss_fn": lambda m, b: (m(b[0]) - b[1]).square()}, r"Tensor \(4, 1\)"),
    ({"loss_fn": lambda m, b: 1.0}, "returned float"),
    ({"loss_fn": lambda m, b: mean_square(m, b).detach()}, "scalar tensor with a gradient"),
    ({"loss_fn": lambda m, b: mean_square(m, b) * float("nan")}, "the loss is nan in batch 0"),
    ({"loss_fn": lambda m, b: mean_square(m, b) + (m.last.weight * 0).abs().sqrt().sum()}, r"'last\.weight' is not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_bad_input_is_refused_in_one_line_and_leaves_the_optimizer(change, message):
    model = make_network()
    optimizer = make_adam(model)
    options = {"model": model, "batches": DataLoader(make_data(8), 4), "loss_fn": mean_square} | change
    with pytest.raises(InputError, match=message) as caught:
        initialize_v0(optimizer, **options)
    assert "\n" not in str(caught.value)
    assert len(optimizer.state) == 0


def test_optimizers_that_cannot_take_it_are_refused():
    model = make_network()
    options = {"model": model, "batches": DataLoader(make_data(8), 4), "loss_fn": mean_square}
    with pytest.raises(InputError, match="no second moment"):
        initialize_v0(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    with pytest.raises(InputError, match="holds no trainable parameter"):
        initialize_v0(make_adam(make_network()), **options)
    with pytest.raises(InputError, match="no decaying mean"):
        initialize_v0(torch.optim.Adagrad(model.parameters()), **options, v0_decay_steps=10)
    stepped = make_adam(model)
    mean_square(model, make_data(4)[:]).backward()
    stepped.step()
    before = read_all(stepped, model)
    with pytest.raises(InputError, match="parameters already have optimizer state"):
        initialize_v0(stepped, **options)
    assert_same(read_all(stepped, model), before)


def test_decay_steps_below_one_are_a_share_of_max_steps():
    model = make_network(batch_norm=False)
    (share, v0), (steps, same) = (
        run(model, DataLoader(make_data(8), 2), v0_decay_steps=decay_steps, max_steps=18) for decay_steps in (0.3, 6)
    )
    assert share.decay_steps == steps.decay_steps == 6
    assert_same(v0, same)


def test_max_steps_gives_the_expectation_and_its_warning(our_log):
    options = {"v0_scale": 1e6, "effective_batch_size": 1, "max_steps": 20}
    report, _ = run(make_network(batch_norm=False), DataLoader(make_data(8), 2), **options)
    assert report.multiplier["20"] == pytest.approx((1 + 1e6 * 0.999**20 / (1 - 0.999**20)) ** -0.5, rel=1e-6)
    assert any(r.levelname == "WARNING" for r in our_log.records)
