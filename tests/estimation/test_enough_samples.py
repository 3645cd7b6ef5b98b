"""`--v0_num_samples auto` on synthetic gradients whose E[g^2] is known, and in the Trainer."""

import itertools

import pytest
import torch
from conftest import make_sequences
from torch import nn
from trainers import make_trainer, record

from hf_v0init import InputError, V0InitArguments
from hf_v0init.estimation.batches import SampledBatches, iterate_streamed_batches
from hf_v0init.estimation.statistics import PassCounts, StatisticsBatch, visit_gradients
from hf_v0init.estimation.stopping import (
    MAX_NUM_SAMPLES,
    TOLERANCE,
    SumsSeen,
    compute_relative_errors,
    list_stages,
    see_sums,
)
from hf_v0init.initialization.plan import plan_v0
from hf_v0init.initialization.writing import estimate_grad_sq_mean, write_v0
from hf_v0init.records.report import V0Report
from hf_v0init.second_moment.state import read_second_moment
from hf_v0init.trainer.arguments import V0InitTrainingArguments

NUM_ELEMENTS = 4000


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64, 128, 200])
@pytest.mark.parametrize("num_samples", [2, 100, 128, 129, 1000, 5000])
def test_stages_double_and_join_to_the_whole(batch_size, num_samples):
    stages = list_stages(batch_size, num_samples)
    total = -(-num_samples // batch_size)
    assert [batch for first, end in stages for batch in range(first, end)] == list(range(total))
    assert min(stages[0][1], total) == min(max(2, -(-128 // batch_size)), total)
    for first, end in stages[1:-1]:
        assert end == 2 * first
    assert stages[-1][1] <= 2 * max(1, stages[-1][0]) or len(stages) == 1


def test_the_default_stages_are_128_256_512_up_to_5000():
    assert [end for _, end in list_stages(1)] == [128, 256, 512, 1024, 2048, 4096, 5000]


class Drawn(nn.Module):
    """A weight whose gradient on a batch is the mean of the batch's rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_ELEMENTS // 40, 40))

    def forward(self, rows):
        return (self.weight.flatten() * rows.mean(0)).sum()


def draw(kind: str, num: int, seed: int) -> torch.Tensor:
    """Stationary gradients, a row a sample, of different sizes by element: normal, rare (1 in 20) or constant up to their sign."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-3, 0, NUM_ELEMENTS)
    if kind == "constant":
        return size.expand(num, -1) * torch.randn(num, 1, generator=generator).sign()
    rows = torch.randn(num, NUM_ELEMENTS, generator=generator)
    if kind == "rare":
        rows = rows * (torch.rand(num, NUM_ELEMENTS, generator=generator) < 0.05)
    return rows * size


def write_auto(rows: torch.Tensor, batch_size: int = 1):
    model = Drawn()
    optimizer = torch.optim.AdamW(model.parameters())
    plan = plan_v0(optimizer, model)

    def run_stage(first, end, named, visit):
        parts = ((k, rows[k * batch_size : (k + 1) * batch_size]) for k in range(first, end))
        batches = [StatisticsBatch(part, len(part), k) for k, part in parts]
        return visit_gradients(model, named, batches, lambda model, part: model(part), visit)

    stages = [
        lambda named, visit, stage=stage: run_stage(*stage, named, visit)
        for stage in list_stages(batch_size, len(rows))
    ]
    report = write_v0(plan, estimate_grad_sq_mean(plan, stages, 8.0), 1.0)
    return report, read_second_moment(optimizer, model.weight).flatten()


@pytest.mark.parametrize(
    ("kind", "batch_size", "expected"),
    [
        # The median error from n squares of variance V and mean 1 is .674 sqrt(V / n): V = 2 for normal gradients.
        ("constant", 1, 256),
        ("normal", 1, 256),  # 0.06 at 256
        ("normal", 8, 1024),  # 1024 samples are 128 squares: 0.084
        ("rare", 1, 4096),  # V = 3 / 0.05 - 1 = 59: 0.115 at 2048, 0.081 at 4096
    ],
)
def test_auto_takes_the_fewest_samples_whose_v0_is_within_ten_percent(kind, batch_size, expected):
    report, v0 = write_auto(draw(kind, MAX_NUM_SAMPLES, seed=1), batch_size)
    assert report.num_samples == expected
    exact = torch.logspace(-3, 0, NUM_ELEMENTS).square() * (0.05 if kind == "rare" else 1.0)
    assert ((v0 - exact).abs() / exact).median() <= TOLERANCE


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "rare"])
def test_half_the_difference_of_the_halves_is_as_large_as_the_error(kind, seed):
    """The rule's look at the error beside the true error, on the same samples."""
    rows = draw(kind, 1024, seed)
    exact = torch.logspace(-3, 0, NUM_ELEMENTS).square() * (0.05 if kind == "rare" else 1.0)

    def see(count):
        part = rows[:count]
        return see_sums([part.sum(0)], [part.square().sum(0)], PassCounts(count, count))

    looked = compute_relative_errors(see(512), see(1024), 1.0).median()
    true = ((rows.square().mean(0) - exact).abs() / exact).median()
    assert looked.item() == pytest.approx(true.item(), rel=0.2)


def test_auto_ends_with_all_samples_where_they_never_agree():
    rows = draw("rare", 600, seed=5)
    report, v0 = write_auto(rows)
    assert (report.num_samples, report.num_batches) == (600, 600)
    torch.testing.assert_close(v0, rows.square().mean(0), rtol=1e-4, atol=1e-12)


def test_elements_without_gradient_do_not_count():
    rows = draw("normal", 1024, seed=7)
    rows[:, ::2] = 0.0
    report, v0 = write_auto(rows)
    assert report.num_samples == 256 and not v0[::2].any()
    none = SumsSeen(torch.zeros(3), torch.zeros(3), PassCounts(8, 8))
    more = SumsSeen(torch.zeros(3), torch.zeros(3), PassCounts(16, 16))
    assert compute_relative_errors(none, more, 1.0).numel() == 0
    assert write_auto(torch.zeros(1024, NUM_ELEMENTS))[0].num_samples == 256


# ---- flag and Trainer ------------------------------------------------------------------------------------------------


def test_the_flag_is_a_number_or_auto():
    from transformers import HfArgumentParser

    def parse(text):
        (parsed,) = HfArgumentParser(V0InitTrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", "x", "--use_cpu", "--v0_num_samples", text]
        )
        return parsed.v0_num_samples

    assert parse("auto") == "auto" and parse("128") == 128
    assert V0InitArguments(v0_num_samples="auto").get_max_num_samples() == 5000
    assert V0InitArguments(v0_num_samples=7).get_max_num_samples() == 7
    for bad in ("some", "1.5", "-3"):
        with pytest.raises(InputError, match=f"v0_num_samples={bad}: must be a whole number >= 1, or auto"):
            parse(bad)
    with pytest.raises(InputError, match="or auto"):
        V0InitArguments(v0_num_samples=2.5)


def test_a_trainer_with_auto_takes_a_prefix_of_what_all_samples_are(tmp_path):
    """Stops early, or ends as the fixed number does, bit for bit."""
    data = make_sequences(600)
    options = {
        "data": data,
        "v0_init": "data_driven",
        "v0_estimator": "per_sample",
        "max_steps": 1,
        "v0_stats_batch_size": 1,
    }
    auto, _ = record(tmp_path / "auto", v0_num_samples="auto", **options)
    report = auto.get_v0_report()
    assert report["num_samples_requested"] == "auto"
    assert report["num_samples"] in (256, 512, 600) and report["num_batches"] == report["num_samples"]
    few = {**options, "data": make_sequences(100)}
    all_of_few, expected = record(tmp_path / "all", v0_num_samples=5000, **few)
    auto_of_few, found = record(tmp_path / "few", v0_num_samples="auto", **few)
    assert auto_of_few.get_v0_report()["num_samples"] == all_of_few.get_v0_report()["num_samples"] == 100
    for name, v0 in expected.v0.items():
        assert torch.equal(found.v0[name], v0), name


def test_batches_of_a_stage_are_those_of_the_whole_pass():
    """On three processes together; and at each stage each process has as many, since a loss may communicate."""
    data, stages = list(range(50)), list(itertools.pairwise((0, 5, 9, 99)))

    def read(rank, stage, streamed):
        place = {"seed": 1, "rank": rank, "world_size": 3, "batch_range": stage}
        if streamed:
            return list(iterate_streamed_batches(_Stream(data), list, 50, 4, **place))
        return list(SampledBatches(data, list, data, 4, **place))

    whole = {k: data[4 * k : 4 * k + 4] for k in range(13)}
    for streamed in (False, True):
        seen = {}
        for stage in stages:
            by_rank = [read(rank, stage, streamed) for rank in range(3)]
            assert len({len(batches) for batches in by_rank}) == 1
            counted = [batch for batches in by_rank for batch in batches if batch.counts]
            assert not seen.keys() & {batch.index for batch in counted}
            seen |= {batch.index: batch.inputs for batch in counted}
            assert len(counted) == min(stage[1], 13) - stage[0]
        assert seen == whole


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_a_stream_that_ends_early_ends_the_pass(tmp_path):
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_sequences(200))

    options = {"v0_init": "data_driven", "v0_estimator": "per_sample", "max_steps": 1, "v0_stats_batch_size": 1}
    options |= {"v0_num_samples": "auto"}
    trainer = make_trainer(tmp_path, data=Rows(), **options)
    trainer.train()
    assert trainer.get_v0_report()["num_samples"] == 200


def test_another_request_is_named_on_resume():
    report = V0Report("data_driven", 1.0, 0, num_samples_requested="auto")
    stored = V0Report("data_driven", 1.0, 0, num_samples_requested=5000).to_dict()
    assert report.find_differences(stored) == ["num_samples_requested: 5000 -> auto"]
