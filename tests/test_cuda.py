"""The invariants of a run once more on a GPU: where v0 lies, that it is the CPU's, and that nothing else changes."""

import gc

import pytest
import torch
from conftest import make_gpt2
from trainers import (
    assert_equal_weights,
    assert_recurrence,
    make_trainer,
    record,
    second_moments_of,
    train,
)

from hf_v0init.state_guard import preserve_rng

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

STRATEGIES = ["random", "data_driven", "first_gradient"]
ON_GPU = {"use_cpu": False}
BETA2 = {"v0_decay": "beta2"}  # a v0 that stands before the first step


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_zeros_is_the_stock_trainer_bit_for_bit(tmp_path, optim, precision):
    options = {"optim": optim, "max_steps": 8, **precision, **ON_GPU}
    stock = train(tmp_path / "a", stock=True, **options)
    ours = train(tmp_path / "b", v0_init="zeros", **options)
    assert next(ours.model.parameters()).is_cuda
    assert_equal_weights(stock, ours)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_v0_has_no_side_effect_on_the_run(tmp_path, strategy, options):
    """With v0 erased before the first step the run is the stock run: same order, same dropout masks of the GPU's generator."""
    stock = train(tmp_path / "a", stock=True, **ON_GPU, **options)
    ours, recorder = record(tmp_path / "b", erase=True, v0_init=strategy, **BETA2, **ON_GPU, **options)
    assert len(recorder.v0) == 10
    assert_equal_weights(stock, ours)


def test_random_v0_is_the_one_of_the_cpu_bit_for_bit(tmp_path):
    _, cpu = record(tmp_path / "a", v0_init="random", max_steps=1, **BETA2)
    trainer, gpu = record(tmp_path / "b", v0_init="random", max_steps=1, **BETA2, **ON_GPU)
    assert cpu.v0.keys() == gpu.v0.keys() and len(gpu.v0) == 10
    for name, parameter in trainer.model.named_parameters():
        if name in gpu.v0:
            assert gpu.v0[name].device == parameter.device and gpu.v0[name].dtype == parameter.dtype
            assert torch.equal(gpu.v0[name].cpu(), cpu.v0[name])


@pytest.mark.parametrize("estimator", ["per_sample", "minibatch"])
def test_data_driven_v0_is_the_one_of_the_cpu(tmp_path, estimator):
    """Without dropout the two differ by the rounding of the gradients alone."""
    options = {"v0_init": "data_driven", "v0_estimator": estimator, "max_steps": 1, **BETA2}
    _, cpu = record(tmp_path / "a", model=make_gpt2(dropout=0.0), **options)
    _, gpu = record(tmp_path / "b", model=make_gpt2(dropout=0.0), **options, **ON_GPU)
    assert cpu.v0.keys() == gpu.v0.keys() and len(gpu.v0) == 10
    for name, v0 in cpu.v0.items():
        scale = v0.double().mean().item()
        torch.testing.assert_close(gpu.v0[name].cpu().double() / scale, v0.double() / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("optim", "rtol"), [("adamw_torch", 1e-6), ("adamw_torch_fused", 2e-5)])
def test_first_step_obeys_the_recurrence(tmp_path, optim, rtol):
    """The fused kernel takes 1 - beta2 of beta2 in fp32, which for .999 is off by 1.3e-5 of its value."""
    options = {"v0_init": "data_driven", "v0_decay": "beta2", "optim": optim, "max_grad_norm": 0.0, "max_steps": 2}
    trainer, recorder = record(tmp_path, **options, **ON_GPU)
    assert_recurrence(recorder, rtol=rtol)
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stop_and_resume_is_the_straight_run(tmp_path, strategy):
    common = {"v0_init": strategy, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, **ON_GPU}
    straight = train(tmp_path / "a", **common)
    resumed = make_trainer(tmp_path / "a", model=make_gpt2(seed=99), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_equal_weights(straight, resumed)
    for name, moment in second_moments_of(straight).items():
        assert torch.equal(moment, second_moments_of(resumed)[name])


def test_the_generators_of_the_gpu_are_put_back():
    torch.cuda.manual_seed_all(5)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed_all(5)
    with preserve_rng():
        torch.cuda.manual_seed_all(7)
        torch.rand(10, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_the_pass_leaves_no_memory_behind(tmp_path):
    """After the run a Trainer with a v0 holds as many bytes of the GPU as the stock Trainer."""

    def measure_bytes(folder, **options):
        gc.collect()
        before = torch.cuda.memory_allocated()
        trainer = train(tmp_path / folder, max_steps=2, **ON_GPU, **options)
        gc.collect()
        return torch.cuda.memory_allocated() - before, len(trainer.optimizer.state)

    measure_bytes("warm", stock=True)  # the libraries' workspaces
    assert measure_bytes("a", stock=True) == measure_bytes("b", v0_init="data_driven")
