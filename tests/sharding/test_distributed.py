"""DDP on gloo CPU processes: the same v0 on every rank, the same as on one process, no deadlock, one reduction."""

import json
from pathlib import Path

import pytest
import torch
from processes import launch

PER_SAMPLE = {"v0_init": "data_driven", "v0_decay": "beta2", "v0_estimator": "per_sample", "max_steps": 1}
RUNS = {
    "stock": {"stock": True, "max_steps": 20},
    "zeros": {"v0_init": "zeros", "max_steps": 20},
    "stock_accumulate": {"stock": True, "max_steps": 10, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "zeros_accumulate": {"v0_init": "zeros", "max_steps": 10, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "data_driven": PER_SAMPLE | {"max_grad_norm": 0.0},
    "data_driven_batches": PER_SAMPLE | {"v0_stats_batch_size": 4, "num_samples": 37},
    "one_sample": PER_SAMPLE | {"num_samples": 1},
    "uneven": PER_SAMPLE | {"num_samples": 35, "v0_stats_batch_size": 8},
    "gathers": PER_SAMPLE | {"num_samples": 41, "trainer": "gathers", "dropout": 0.0},
    "fails": PER_SAMPLE | {"trainer": "fails"},
    "nan": PER_SAMPLE | {"trainer": "fails", "run_name": "nan"},
    "nan_gradient": PER_SAMPLE | {"trainer": "fails", "run_name": "nan_gradient"},
    "nan_gradient_of_a_step": {"v0_init": "data_driven", "v0_decay": "beta2", "max_steps": 2, "trainer": "nan_step"},
}  # fmt: skip
FAILING = ("fails", "nan", "nan_gradient", "nan_gradient_of_a_step")


def start(num_processes: int, runs: dict, folder: Path) -> dict[str, list[dict]]:
    """Run the runs on so many processes; {name: [what each rank saved]}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    launch("launched/train.py", num_processes, folder / "runs.json", folder)
    return {
        name: [torch.load(folder / f"{name}.rank{rank}.pt", weights_only=False) for rank in range(num_processes)]
        for name in runs
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    one = {name: run for name, run in RUNS.items() if name not in FAILING and "stock" not in run}
    return {1: start(1, one, folder / "1"), 2: start(2, RUNS, folder / "2")}


@pytest.mark.parametrize("suffix", ["", "_accumulate"])
def test_zeros_is_the_stock_trainer_bit_for_bit(results, suffix):
    for stock, ours in zip(results[2]["stock" + suffix], results[2]["zeros" + suffix], strict=True):
        assert all(torch.equal(w, ours["weights"][name]) for name, w in stock["weights"].items())


@pytest.mark.parametrize("name", ["data_driven", "data_driven_batches", "uneven", "one_sample", "gathers"])
def test_v0_is_that_of_one_process_on_the_same_samples_and_the_same_on_both_ranks_bit_for_bit(results, name):
    """Dropout included: it is seeded by batch. fp32 sums in another order: 1e-6 relative, of the tensor's largest v0."""
    one, (two, second) = results[1][name][0], results[2][name]
    assert all(torch.equal(v0, second["v0"][key]) for key, v0 in two["v0"].items())
    assert two["report"]["parameters"] == second["report"]["parameters"]
    assert len(one["v0"]) == 10 and (one["world_size"], two["world_size"]) == (1, 2)
    for key, v0 in one["v0"].items():
        torch.testing.assert_close(two["v0"][key], v0, rtol=1e-6, atol=1e-6 * v0.max().item())
    for figure in ("num_samples", "num_batches"):
        assert one["report"][figure] == two["report"][figure]


def test_samples_and_batches_are_counted_over_all_processes(results):
    """Of 41 batches for two processes one runs one more that does not count, or a loss that gathers would wait for ever."""
    first, second = (saved["num_losses"] for saved in results[2]["gathers"])
    assert first == second and results[2]["gathers"][0]["report"]["num_samples"] == 41
    report = results[2]["data_driven_batches"][0]["report"]
    assert (report["num_samples"], report["num_batches"]) == (37, 9)  # eight of 4 and one of 5
    assert results[2]["one_sample"][1]["report"]["num_samples"] == 1


def test_the_pass_sends_two_numbers_a_parameter_once(results):
    """48 batches in the pass, yet each sum is reduced once, at the end, and so are the four counts."""
    saved = results[2]["data_driven"][0]
    calls, num_bytes = saved["all_reduces"]
    assert calls == 2 * saved["report"]["num_parameters_with_v0"] + 1
    assert num_bytes == 2 * 4 * saved["report"]["num_elements_with_v0"] + 8 * 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", "disk full on this one"),
        ("nan", "loss is nan in batch 13"),
        ("nan_gradient", "not finite"),
        ("nan_gradient_of_a_step", "the gradient of parameter 'transformer.wte.weight' is not finite"),
    ],
)
def test_an_error_on_one_rank_stops_all_with_that_error_and_writes_nothing(results, name, words):
    for saved in results[2][name]:
        assert words in saved["error"], saved["error"]
        assert saved["num_states"] == 0
        assert saved["report"] is None
