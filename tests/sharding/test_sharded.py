"""Sharded training on gloo CPU processes: v0 in the live optimizer state before the first step is that of one process.

FSDP2 (transformers' `DistributedConfig`, hybrid sharding, accelerate's plugin), DeepSpeed ZeRO-1, 2 and 3, and DDP beside
them; without a Trainer `fully_shard`, tensor parallelism, and both. accelerate gives its plugin to accelerators only, so here it
is put in its place by hand; what it does with the parameters is the same. No dropout: its masks differ where a batch is shared
out.
"""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import VOCAB
from launched import shard_plainly, train_sharded
from processes import launch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_v0init import InputError
from hf_v0init.trainer.supported_runs import require_supported_run

NUM_PARAMETERS = 21  # tensors of the model, 16 of them with two dimensions
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'hf_v0init[deepspeed]'",
)

ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0}
DATA_DRIVEN = ONE_STEP | {"v0_init": "data_driven", "v0_decay": "beta2"}
PER_SAMPLE = DATA_DRIVEN | {"v0_estimator": "per_sample"}
RUNS = {
    "random": ONE_STEP | {"v0_init": "random", "v0_decay": "beta2"},
    "data_driven": DATA_DRIVEN,
    "minibatch": {"v0_init": "data_driven", "v0_decay": "beta2", "v0_estimation_steps": 3, "max_steps": 4},  # clipped, of 8 samples on any number
    "include_bias_and_norm": DATA_DRIVEN | {"v0_include_bias_and_norm": True},
    "linear": {"v0_init": "data_driven", "v0_decay_steps": 4, "v0_estimation_steps": 2, "max_steps": 6, "learning_rate": 1e-3},
    "linear_random": {"v0_init": "random", "v0_decay_steps": 4, "max_steps": 6, "learning_rate": 1e-3},
    "first_gradient": ONE_STEP | {"v0_init": "first_gradient", "v0_decay": "beta2", "gradient_accumulation_steps": 2},
    "per_sample": PER_SAMPLE,  # refused where the model is sharded
}  # fmt: skip
OF_A_STEP = ("data_driven", "include_bias_and_norm", "minibatch", "first_gradient")
AT_FOUR = ["random", "data_driven", "include_bias_and_norm", "minibatch", "first_gradient", "linear", "linear_random"]
AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": AUTO | {"torch_adam": True}}}
REFUSED = {
    "lamb": ({"optimizer": {"type": "Lamb", "params": {"lr": "auto"}}}, 'remove the ds_config key "optimizer"'),
    "offload": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        'ds_config key "offload_optimizer" is not supported: remove it',
    ),
    "stage_0": ({"zero_optimization": {"stage": 0}}, "use ZeRO stage 1, 2 or 3"),
}


def make_model_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB + 1, hidden_size=16, intermediate_size=22, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def start(num_processes: int, script: str, *arguments, **options):
    environment = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(num_processes)}
    return launch(f"launched/{script}", num_processes, *arguments, time_limit=540, **environment, **options)


def start_runs(num_processes: int, runs: dict, folder: Path, model_folder: Path) -> dict[str, list[dict]]:
    """Run the runs on so many processes; {name: [what each rank saved]}."""
    folder.mkdir(parents=True)
    batch_size = {"per_device_train_batch_size": 8 // num_processes}  # so that a step has 8 samples on any number
    (folder / "runs.json").write_text(json.dumps({name: batch_size | run for name, run in runs.items()}))
    start(num_processes, "train_sharded.py", folder / "runs.json", folder, model_folder)
    return {
        name: [torch.load(folder / f"{name}.rank{rank}.pt", weights_only=False) for rank in range(num_processes)]
        for name in runs
    }


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


class RunsAlone(dict):
    """{name: what the run saves on one process, this one}, each run when first asked for."""

    def __init__(self, folder: Path, model_folder: Path):
        super().__init__()
        self.folder, self.model_folder = folder, model_folder

    def __missing__(self, name: str) -> dict:
        run = RUNS[name] | {"mode": "whole", "per_device_train_batch_size": 8}
        self[name] = train_sharded.train(run, self.folder / name, str(self.model_folder))
        return self[name]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model_folder):
    return RunsAlone(tmp_path_factory.mktemp("alone"), model_folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, model_folder):
    """{(mode, number of processes): {name: [what each rank saved]}}, launched when first asked for."""
    launches = {
        ("torch", 2): (["fsdp2", "whole"], list(RUNS)),
        ("torch", 4): (["fsdp2", "hybrid", "whole"], AT_FOUR),
        ("zero", 2): (["zero1", "zero2", "zero3"], list(RUNS)),
        ("zero", 4): (["zero2", "zero3"], AT_FOUR),
    }
    results: dict = {}

    def get(mode: str, num_processes: int) -> dict:
        family = ("zero" if mode.startswith("zero") else "torch", num_processes)
        if family not in results:
            modes, names = launches[family]
            folder = tmp_path_factory.mktemp(f"{family[0]}{num_processes}") / "runs"
            runs = {f"{mode}.{name}": RUNS[name] | {"mode": mode} for mode in modes for name in names}
            results[family] = start_runs(num_processes, runs, folder, model_folder)
        return {
            key.removeprefix(f"{mode}."): saved for key, saved in results[family].items() if key.startswith(f"{mode}.")
        }

    return get


PLACES = pytest.mark.parametrize(
    ("mode", "num_processes"),
    [
        *(pytest.param("whole", n, id=f"ddp-{n}") for n in (2, 4)),
        *(pytest.param("fsdp2", n, id=f"fsdp2-{n}") for n in (2, 4)),
        pytest.param("hybrid", 4, id="hybrid-4"),
        *(pytest.param(f"zero{n}", 2, id=f"zero{n}-2", marks=needs_deepspeed) for n in (1, 2, 3)),
        *(pytest.param(f"zero{n}", 4, id=f"zero{n}-4", marks=needs_deepspeed) for n in (2, 3)),
    ],
)


def assert_equal_v0(
    ranks: list[dict], expected: dict[str, torch.Tensor], exact: bool = False, rtol: float = 1e-6
) -> None:
    """fp32 sums in another order: `rtol` relative, of the tensor's largest v0 for those much smaller."""
    assert [saved["error"] for saved in ranks] == [None] * len(ranks)
    for saved in ranks:
        # A flat partition of ZeRO holds vectors beside matrices: they start at zero, as without state.
        assert not any(v0.any() for name, v0 in saved["v0"].items() if name not in expected)
        for name, v0 in expected.items():
            if exact:
                assert torch.equal(saved["v0"][name], v0), name
            else:
                torch.testing.assert_close(saved["v0"][name], v0, rtol=rtol, atol=rtol * v0.max().item())


def assert_recurrence(saved: dict, rtol: float = 1e-6) -> None:
    assert len(saved["moments"]) == len(saved["gradients"][-1]) == NUM_PARAMETERS
    for name, v1 in saved["moments"].items():
        g = saved["gradients"][-1][name].double()
        v0 = saved["v0"].get(name, torch.zeros_like(g)).double()
        torch.testing.assert_close(v1.double(), 0.999 * v0 + 0.001 * g.square(), rtol=rtol, atol=1e-20)


def test_fsdp2_gives_the_v0_of_one_process_and_the_per_sample_estimation_is_refused(tmp_path, model_folder, alone):
    """The fast one: runs of each strategy on two processes."""
    runs = {name: RUNS[name] | {"mode": "fsdp2"} for name in ("random", "data_driven", "minibatch", "per_sample")}
    saved = start_runs(2, runs, tmp_path / "runs", model_folder)
    assert [rank["num_sharded"] for rank in saved["random"]] == [NUM_PARAMETERS] * 2
    assert_equal_v0(saved["random"], alone["random"]["v0"], exact=True)
    assert_equal_v0(saved["data_driven"], alone["data_driven"]["v0"], rtol=1e-5)
    assert_equal_v0(saved["minibatch"], alone["minibatch"]["v0"], rtol=1e-5)
    assert_recurrence(saved["data_driven"][1])
    assert_refused(saved["per_sample"], "FSDP2 or tensor parallelism")


def assert_refused(ranks: list[dict], kind: str) -> None:
    for saved in ranks:
        assert saved["error"].startswith(f"InputError: v0_estimator=per_sample under {kind} is not supported")
        assert "use v0_estimator=minibatch" in saved["error"]
        assert saved["num_states"] == 0 and saved["report"] is None


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_per_sample_estimation_is_refused_under_zero(sharded, stage):
    assert_refused(sharded(f"zero{stage}", 2)["per_sample"], "DeepSpeed ZeRO")


@pytest.mark.slow
def test_the_per_sample_estimation_under_ddp_is_that_of_one_process(sharded, alone):
    assert_equal_v0(sharded("whole", 2)["per_sample"], alone["per_sample"]["v0"])


@pytest.mark.slow
@PLACES
def test_random_v0_is_that_of_one_process_bit_for_bit(sharded, alone, mode, num_processes):
    ranks = sharded(mode, num_processes)["random"]
    for saved in ranks:
        assert saved["world_size"] == num_processes
        assert saved["num_sharded"] == (NUM_PARAMETERS if mode in ("fsdp2", "hybrid") else 0)
        assert_recurrence(saved)
    assert_equal_v0(ranks, alone["random"]["v0"], exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_STEP)
@PLACES
def test_data_driven_v0_is_the_mean_square_of_the_reduced_gradients_as_on_one_process(
    sharded, alone, mode, num_processes, name
):
    ranks, expected = sharded(mode, num_processes)[name], alone[name]["report"]
    assert_equal_v0(ranks, alone[name]["v0"], rtol=1e-5)
    for figure in ("num_samples", "num_batches", "num_zero_elements", "without_gradient", "num_elements_with_v0"):
        assert ranks[0]["report"][figure] == expected[figure]
    for figure in ("v0_mean", "v0_max", "mean_loss", "effective_batch_size"):
        value = None if expected[figure] is None else pytest.approx(expected[figure], rel=1e-5)
        assert ranks[0]["report"][figure] == value
    for saved in ranks:
        for figure in ("parameters", "measured_ratio"):
            assert saved["report"][figure] == ranks[0]["report"][figure]
        assert_recurrence(saved)
        (step,) = saved["gradients"]  # at step 1 it is of this step's; later ones refine it
        clipped = RUNS[name].get("max_grad_norm", 1.0) > 0 and mode.startswith("zero")
        for key in (k for k, v in saved["v0"].items() if v.dim() >= 2):
            square = (clip(step) if clipped else step)[key].square()
            torch.testing.assert_close(saved["v0"][key], square, rtol=1e-4, atol=1e-5 * square.max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "linear_random", "minibatch"])
@PLACES
def test_all_of_the_first_steps_are_those_of_one_process(sharded, alone, mode, num_processes, name):
    """The weights after v0 has gone; a difference of 1% of the rate is one of rounding in few elements of small gradients."""
    for saved in sharded(mode, num_processes)[name]:
        assert saved["report"]["decay"] == ("beta2" if name == "minibatch" else "linear")
        for key, weight in alone[name]["weights"].items():
            torch.testing.assert_close(saved["weights"][key], weight, rtol=1e-5, atol=1e-5)


def clip(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ZeRO clips inside its step, after these were read."""
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    return {name: g / max(1.0, norm.item() + 1e-6) for name, g in gradients.items()}


@pytest.mark.slow
def test_accelerates_fsdp2_plugin_and_bf16(tmp_path, model_folder, alone):
    runs = {
        "bf16": DATA_DRIVEN | {"mode": "fsdp2", "bf16": True},
        "random": RUNS["random"] | {"mode": "whole", "trainer": "accelerate"},
        "data_driven": DATA_DRIVEN | {"mode": "whole", "trainer": "accelerate"},
        "first_gradient": RUNS["first_gradient"] | {"mode": "whole", "trainer": "accelerate"},
    }
    saved = start_runs(2, runs, tmp_path / "runs", model_folder)
    assert [rank["num_sharded"] for rank in saved["random"]] == [NUM_PARAMETERS] * 2
    assert_equal_v0(saved["random"], alone["random"]["v0"], exact=True)
    assert_equal_v0(saved["data_driven"], alone["data_driven"]["v0"], rtol=1e-5)
    for name in runs:
        assert_recurrence(saved[name][0])
    for name, v0 in saved["first_gradient"][0]["v0"].items():
        expected = saved["first_gradient"][0]["gradients"][0][name].square()
        torch.testing.assert_close(v0, expected, rtol=1e-5, atol=1e-6 * expected.max().item())
    for name, v0 in alone["data_driven"]["v0"].items():
        torch.testing.assert_close(saved["bf16"][0]["v0"][name], v0, rtol=0.1, atol=0.02 * v0.max().item())


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"mode": "zero2"}, id="zero2", marks=needs_deepspeed),
        pytest.param({"mode": "zero3"}, id="zero3", marks=needs_deepspeed),
        pytest.param({"mode": "whole", "trainer": "accelerate"}, id="accelerates-fsdp2"),
    ],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one_and_takes_no_v0_again(tmp_path, model_folder, how):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2} | how
    runs = {}
    first_steps = {"v0_init": "data_driven", "v0_decay": "beta2", "v0_estimation_steps": 3}
    linear = {"v0_init": "data_driven", "v0_decay_steps": 5}
    kinds = {"": DATA_DRIVEN, "_estimating": first_steps, "_estimating_s": linear | {"v0_estimation_steps": 3}}
    kinds |= {"_decaying": linear | {"v0_estimation_steps": 1}, "_decaying_draws": linear | {"v0_init": "random"}}
    for name, run in kinds.items():
        runs[f"through{name}"] = run | saving
        runs[f"resumed{name}"] = run | saving | {"resume_from": f"through{name}/out/checkpoint-2"}
    saved = start_runs(2, runs, tmp_path / "runs", model_folder)
    for kind in (kind for kind in kinds if kind):
        for through, resumed in zip(saved[f"through{kind}"], saved[f"resumed{kind}"], strict=True):
            assert all(torch.equal(w, resumed["weights"][name]) for name, w in through["weights"].items()), kind
            assert resumed["report"]["parameters"] == through["report"]["parameters"]
    for through, resumed in zip(saved["through"], saved["resumed"], strict=True):
        assert all(torch.equal(w, resumed["weights"][name]) for name, w in through["weights"].items())
        assert resumed["report"] == saved["through"][0]["report"]  # the main process's, with its seconds
        assert not torch.equal(resumed["v0"]["lm_head.weight"], through["v0"]["lm_head.weight"])


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configurations(tmp_path, model_folder, alone, stage):
    """The ds_config's own AdamW, a model split while it loads, bf16; and what is refused, before any step."""
    zero = {"mode": f"zero{stage}"}
    runs = {
        "own_random": RUNS["random"] | zero | {"ds_config": TORCH_ADAM},
        "own": DATA_DRIVEN | zero | {"ds_config": TORCH_ADAM},
        "split": DATA_DRIVEN | zero | {"split_while_loading": True},
        "bf16": DATA_DRIVEN | zero | {"bf16": True, "ds_config": {"bf16": {"enabled": True}}},
    }
    runs |= {name: RUNS["random"] | zero | {"ds_config": config} for name, (config, _) in REFUSED.items()}
    saved = start_runs(2, runs, tmp_path / "runs", model_folder)
    assert_equal_v0(saved["own_random"], alone["random"]["v0"], exact=True)
    for name in ("own", "split"):
        assert_equal_v0(saved[name], alone["data_driven"]["v0"], rtol=1e-5)
        assert_recurrence(saved[name][0])
    assert_recurrence(saved["bf16"][0])
    for name, v0 in alone["data_driven"]["v0"].items():
        torch.testing.assert_close(saved["bf16"][0]["v0"][name], v0, rtol=0.1, atol=0.03 * v0.max().item())
    for name, (_, words) in REFUSED.items():
        for rank in saved[name]:
            assert rank["error"].startswith("InputError") and words in rank["error"]
            assert rank["num_states"] == 0


@pytest.mark.slow
@needs_deepspeed
def test_deepspeeds_fused_adam(tmp_path, model_folder, alone):
    """Its step is compiled at first use; the kernel's own rounding is coarser than torch's."""
    run = DATA_DRIVEN | {"mode": "zero2", "ds_config": {"optimizer": {"type": "AdamW", "params": AUTO}}}
    (tmp_path / "runs.json").write_text(json.dumps({"fused": run}))
    done = start(2, "train_sharded.py", tmp_path / "runs.json", tmp_path, model_folder, may_fail=True)
    if "Error building extension" in done.stderr or "Ninja is required" in done.stderr:
        pytest.skip("DeepSpeed's FusedAdam cannot be compiled here: no C++ compiler")
    assert done.returncode == 0, done.stderr[-4000:]
    saved = [torch.load(tmp_path / f"fused.rank{rank}.pt", weights_only=False) for rank in range(2)]
    assert_equal_v0(saved, alone["data_driven"]["v0"], rtol=1e-5)
    assert_recurrence(saved[0], rtol=5e-5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, model_folder):
    """{number of processes: [what each rank saved]} of the runs without a Trainer, launched when first asked for."""
    results: dict = {}

    def get(num_processes: int) -> list[dict]:
        if num_processes not in results:
            folder = tmp_path_factory.mktemp(f"plain{num_processes}")
            start(num_processes, "shard_plainly.py", folder, model_folder)
            ranks = range(num_processes)
            results[num_processes] = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in ranks]
        return results[num_processes]

    return get


@pytest.fixture(scope="module")
def plain_alone(model_folder):
    return shard_plainly.write_both(LlamaForCausalLM.from_pretrained(model_folder))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_processes"), [("tensor_parallel", 2), ("tensor_parallel", 4), ("both", 4)])
def test_without_a_trainer_v0_is_that_of_one_process(plain, plain_alone, kind, num_processes):
    """Rows and columns split over processes, FSDP2 over tensor parallelism (strided shards), plain vectors beside them."""
    for saved in (rank[kind] for rank in plain(num_processes)):
        assert saved["placed_as_parameters"]
        assert any("Shard" in placement for placement in saved["placements"].values())
        for name, weight in plain_alone["linear"].items():  # 1% of the rate: rounding of small gradients
            torch.testing.assert_close(saved["linear"][name], weight, rtol=1e-5, atol=1e-4)
        for name, v0 in plain_alone["random"].items():
            assert torch.equal(saved["random"][name], v0), name
        for name, v0 in plain_alone["steps"]["data_driven"]["v0"].items():
            torch.testing.assert_close(
                saved["steps"]["data_driven"]["v0"][name], v0, rtol=1e-5, atol=1e-5 * v0.max().item()
            )
            g = saved["steps"]["data_driven"]["gradients"][name]
            torch.testing.assert_close(saved["steps"]["data_driven"]["v0"][name], g.square(), rtol=1e-5, atol=1e-20)
        for name, v1 in saved["steps"]["data_driven"]["after"].items():
            g = saved["steps"]["data_driven"]["gradients"][name].double()
            v0 = saved["steps"]["data_driven"]["v0"].get(name, torch.zeros_like(g)).double()
            torch.testing.assert_close(v1.double(), 0.999 * v0 + 0.001 * g.square(), rtol=1e-6, atol=1e-20)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_v0_survives_a_distributed_checkpoint(plain, num_processes):
    for name in ("written", "estimating", "decaying"):
        for saved in (rank["checkpoint"][name] for rank in plain(num_processes)):
            with_v0 = {key: v for key, v in saved["saved"].items() if v.any()}
            assert len(with_v0) == NUM_PARAMETERS
            assert all(torch.equal(v, saved["loaded"][key]) for key, v in with_v0.items())
            kept_on, loaded = saved["steps"]
            assert all(torch.equal(w, loaded[key]) for key, w in kept_on.items())
            assert saved["moved"] and saved["report"] == (name == "estimating")


def make_stub(**settings) -> SimpleNamespace:
    """What `require_supported_run` looks at of a Trainer."""
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=settings.pop("fsdp_plugin", None)),
        parallelism_config=settings.pop("parallelism_config", None),
    )
    config = SimpleNamespace(distributed_config=settings.pop("distributed_config", None))
    return SimpleNamespace(
        is_deepspeed_enabled=False, accelerator=accelerator, model=SimpleNamespace(config=config), args=SimpleNamespace(n_gpu=1),
    )  # fmt: skip


def test_fsdp1_is_refused_and_fsdp2_named():
    with pytest.raises(InputError, match=r"FSDP1.*FSDP2"):
        require_supported_run(make_stub(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=1)))
    require_supported_run(make_stub(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distributed_config": SimpleNamespace(pp_size=2)}, "pipeline parallelism"),
        ({"distributed_config": SimpleNamespace(pp_size=1, ep_size=2)}, "expert parallelism"),
        ({"parallelism_config": SimpleNamespace(cp_size=2)}, "context parallelism"),
        ({"parallelism_config": SimpleNamespace(cp_size=1, sp_size=4)}, "sequence parallelism"),
    ],
)
def test_parallelism_without_whole_samples_or_tensors_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        require_supported_run(make_stub(**settings))
