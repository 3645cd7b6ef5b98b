"""The plan of a comparison: what its YAML means in flags, which runs a grid has, what is refused."""

import ast
import importlib.util
import itertools
import json
import subprocess
import textwrap
from pathlib import Path

import pytest

from hf_v0init.compare.axes import OPTIMIZERS, parse_value
from hf_v0init.compare.comparison_file import read_plan
from hf_v0init.compare.launch import SCRIPT_MODULES, make_command, make_flags
from hf_v0init.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = {"script": "run_clm", "grids": [{"v0": ["zeros"]}]}


@pytest.fixture
def plan_of(tmp_path):
    """Write a mapping, or YAML text, as the file of a comparison and read it."""

    def read(content, **changes):
        path = tmp_path / "grid.yaml"
        arguments = changes.get("arguments", {})
        if "arguments_file" not in changes and isinstance(arguments, dict):
            changes["arguments"] = {"do_eval": True, **arguments}
        path.write_text(content if isinstance(content, str) else json.dumps({**content, **changes}))
        return read_plan(path)

    return read


# ------------------------------------------------------------------------------------------------------ the words


@pytest.mark.parametrize(
    ("value", "name", "flags"),
    [
        ("zeros", "zeros", {"v0_init": "zeros"}),
        ("random 100", "random 100", {"v0_init": "random", "v0_scale": 100.0, "v0_decay": "beta2"}),
        ("random", "random", {"v0_init": "random"}),
        ("data_driven", "data_driven", {"v0_init": "data_driven"}),
        ("data_driven 1e1", "data_driven 10", {"v0_init": "data_driven", "v0_scale": 10.0, "v0_decay": "beta2"}),
        ("data_driven minibatch 10", "data_driven minibatch 10", {"v0_init": "data_driven", "v0_estimator": "minibatch", "v0_scale": 10.0, "v0_decay": "beta2"}),
        ("data_driven linear 200", "data_driven linear 200", {"v0_init": "data_driven", "v0_decay": "linear", "v0_decay_steps": 200}),
        ("data_driven beta2 0.33", "data_driven beta2 0.33", {"v0_init": "data_driven", "v0_decay": "beta2", "v0_decay_steps": 0.33}),
        ("first_gradient 1", "first_gradient 1", {"v0_init": "first_gradient", "v0_scale": 1.0, "v0_decay": "beta2"}),
        ({"v0_init": "random", "v0_scale": 5, "v0_seed": 2}, "random v0_scale=5 v0_seed=2", {"v0_init": "random", "v0_scale": 5, "v0_seed": 2}),
        ({"name": "mine", "v0_init": "data_driven"}, "mine", {"v0_init": "data_driven"}),
        ({"v0_init": "data_driven", "adam_beta2": 0.99, "learning_rate": 1e-3}, "data_driven adam_beta2=0.99 learning_rate=0.001", {"v0_init": "data_driven", "adam_beta2": 0.99, "learning_rate": 1e-3}),
        ({"v0_init": "data_driven", "v0_estimator": "per_sample"}, "data_driven per_sample", {"v0_init": "data_driven", "v0_estimator": "per_sample"}),
        ("data_driven per_sample 10", "data_driven per_sample 10", {"v0_init": "data_driven", "v0_estimator": "per_sample", "v0_scale": 10.0, "v0_decay": "beta2"}),
        ("random linear auto", "random linear auto", {"v0_init": "random", "v0_decay": "linear", "v0_decay_steps": "auto"}),
    ],
)  # fmt: skip
def test_words_of_v0(value, name, flags):
    parsed = parse_value("v0", value)
    assert (parsed.name, parsed.flags) == (name, flags)


@pytest.mark.parametrize(
    ("value", "name", "flags"),
    [
        ("none", "none", {"warmup_steps": 0}),
        (None, "none", {"warmup_steps": 0}),
        (0, "none", {"warmup_steps": 0}),
        (200, "200", {"warmup_steps": 200}),
        (0.3, "0.3", {"warmup_steps": 0.3}),
        ("trust_radius", "trust_radius", {"warmup_steps": 0, "untuned_warmup": "trust_radius"}),
        ("untuned_linear", "untuned_linear", {"warmup_steps": 0, "untuned_warmup": "linear"}),
        ("untuned_exponential", "untuned_exponential", {"warmup_steps": 0, "untuned_warmup": "exponential"}),
        ({"name": "cosine", "lr_scheduler_type": "cosine", "warmup_steps": 7}, "cosine", {"lr_scheduler_type": "cosine", "warmup_steps": 7}),
    ],
)  # fmt: skip
def test_words_of_warmup(value, name, flags):
    parsed = parse_value("warmup", value)
    assert (parsed.name, parsed.flags) == (name, flags)


@pytest.mark.parametrize(
    ("axis", "value", "words"),
    [
        ("v0", "data_drivn 1", "did you mean data_driven"),
        ("v0", "", "cannot be read"),
        ("v0", "zeros 1", "cannot be read"),
        ("v0", "data_driven warmup", "or with a decay and its length"),
        ("v0", "data_driven linear", "a decay and its length in steps, as a fraction of training or 'auto'"),
        ("v0", "data_driven beta2 long", "cannot be read"),
        ("v0", "data_driven nan", "cannot be read"),
        ("v0", {"v0_scale": 1}, "needs v0_init"),
        ("warmup", "linear", "untuned_linear"),
        ("warmup", 1.5, "a fraction of training such as 0.3"),
        ("warmup", -5, "-5"),
        ("warmup", True, "True"),
        ("optimizer", "adamm", "choose adamw"),
        ("optimizer", {"name": "mine"}, "at least one flag"),
    ],
)
def test_words_that_are_refused(axis, value, words):
    with pytest.raises(InputError, match=words) as error:
        parse_value(axis, value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- the grid


def test_a_grid_is_a_product_in_the_order_of_its_axes_and_seed_by_seed(plan_of):
    v0, warmups, rates, seeds = ["zeros", "random 100"], ["none", 50], [1e-3, 2e-3], [2, 1]
    plan = plan_of(
        MINIMAL, grids=[{"v0": v0, "warmup": warmups, "learning_rate": rates, "seed": seeds}], title="T", small=True
    )
    expected = [
        (v, str(w), r, s) for s in seeds for v, w, r in itertools.product(v0, warmups, rates)
    ]  # all of seed 2 before seed 1
    assert [(run.v0, run.warmup, run.learning_rate, run.seed) for run in plan.runs] == expected
    assert [run.setting for run in plan.runs[::2][:4]] == [
        "no warmup",
        "warmup 50",
        "random 100",
        "random 100 + warmup 50",
    ]
    assert len({run.name for run in plan.runs}) == 16 and (plan.title, plan.small) == ("T", True)


def test_missing_axes_are_zeros_none_adamw_and_the_common_rate_and_seed(plan_of):
    (run,) = plan_of(MINIMAL, grids=[{"warmup": "none"}], arguments={"learning_rate": 0.25, "seed": 7}).runs
    assert (run.setting, run.v0, run.warmup, run.optimizer, run.learning_rate, run.seed) == (
        "no warmup", "zeros", "none", "adamw", 0.25, 7,
    )  # fmt: skip
    expected = {"v0_init": "zeros", "warmup_steps": 0, "optim": "adamw_torch", "learning_rate": 0.25, "seed": 7}
    assert expected.items() <= run.arguments.items()
    (run,) = plan_of(MINIMAL).runs
    assert (run.learning_rate, run.seed) == (5e-5, 42)  # transformers' defaults, written out


def test_the_union_of_grids_has_equal_runs_once(plan_of):
    grids = [
        {"v0": ["zeros", "data_driven 1"], "seed": [1, 2]},
        {
            "v0": [
                "data_driven 1",
                "data_driven 1.0",
                {"name": "other words", "v0_init": "data_driven", "v0_scale": 1, "v0_decay": "beta2"},
            ],
            "seed": [2, 3],
        },
        {"v0": "zeros", "warmup": [None, 0, "none"], "seed": 1},
    ]
    runs = plan_of(MINIMAL, grids=grids).runs
    assert [(run.setting, run.seed) for run in runs] == [
        ("no warmup", 1), ("data_driven 1", 1), ("no warmup", 2), ("data_driven 1", 2), ("data_driven 1", 3),
    ]  # fmt: skip


def test_another_flag_is_an_axis_and_names_the_setting_unless_it_has_the_common_value(plan_of):
    grids = [{"v0": "zeros"}, {"optimizer": ["adamw", "radam"], "adam_beta2": [0.98, 0.999]}]
    runs = plan_of(MINIMAL, arguments={"adam_beta2": 0.98}, grids=grids).runs
    assert [(run.setting, run.other) for run in runs] == [
        ("no warmup", {}),
        ("adam_beta2=0.999", {"adam_beta2": 0.999}),
        ("radam", {}),
        ("radam + adam_beta2=0.999", {"adam_beta2": 0.999}),
    ]
    assert [run.arguments["adam_beta2"] for run in runs] == [0.98, 0.999, 0.98, 0.999]


def test_a_name_changes_with_any_argument_and_with_the_launcher_and_with_nothing_else(plan_of):
    def names(**changes):
        return [run.name for run in plan_of(MINIMAL, **changes).runs]

    base = names()
    assert base == names(title="another", metric="eval_perplexity", keep_models=False, small=True)
    assert base == names(grids=[{"v0": "zeros"}, {"v0": "random"}])[:1]
    assert base == names(arguments={"learning_rate": 5e-5})
    others = [
        names(arguments={"weight_decay": 0.1}),
        names(arguments={"weight_decay": 0.2}),
        names(arguments={"disable_tqdm": False}),
        names(script="run_translation"),
        names(launch="python -O"),
    ]
    assert len({*map(tuple, others), tuple(base)}) == 6
    assert names(arguments={"block_size": 16}) == names(arguments={"block_size": 16.0})


def test_yaml_numbers_and_words(plan_of):
    plan = plan_of(
        textwrap.dedent("""
        script: run_clm
        arguments: {do_eval: true, eval-strategy: no, adam_epsilon: 1e-8, run_name: "1e-8", logging_strategy: no}
        grids:
          - learning_rate: [1e-3, 2E-03, .5e-3]
        """)
    )
    assert [run.learning_rate for run in plan.runs] == [0.001, 0.002, 0.0005]
    assert {"eval_strategy": "no", "adam_epsilon": 1e-8, "run_name": "1e-8", "logging_strategy": "no"}.items() <= plan.arguments.items()  # fmt: skip
    assert "eval_on_start" not in plan.arguments  # nothing is evaluated on the way


def test_arguments_lie_over_their_file_which_lies_over_the_defaults(plan_of, tmp_path):
    (tmp_path / "base.yaml").write_text(
        "max_steps: 10\nblock_size: 8\nwarmup_steps: 400\nv0_init: random\noutput_dir: x\nsave_strategy: epoch\n"
        "eval_strategy: steps\nfp16: true\n"
    )
    plan = plan_of(MINIMAL, arguments_file="base.yaml", arguments={"block_size": 16, "fp16": None})
    (run,) = plan.runs
    assert run.arguments == {
        "save_strategy": "epoch", "report_to": "none", "disable_tqdm": True, "logging_nan_inf_filter": False, "max_steps": 10,
        "block_size": 16, "eval_strategy": "steps", "eval_on_start": True, "optim": "adamw_torch", "warmup_steps": 0, "v0_init": "zeros",
        "learning_rate": 5e-5, "seed": 42,
    }  # fmt: skip
    assert json.loads(json.dumps(plan.to_dict()))["arguments"] == plan.arguments
    assert set(plan.to_dict()) >= {
        "title", "small", "script", "launch", "metric", "greater_is_better", "test_metrics", "arguments", "runs",
    }  # fmt: skip
    assert set(plan.to_dict()["runs"][0]) == {
        "name", "stage", "condition", "family", "setting", "v0", "warmup", "optimizer", "other", "learning_rate", "seed", "arguments",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "warmup", "optimizer", "expected"),
    [
        ("constant", 5, "adamw", "constant_with_warmup"),
        ("constant", "none", "adamw", "constant"),
        ("constant", "untuned_linear", "adamw", "constant"),
        ("constant", "trust_radius", "adamw", "constant_with_warmup"),
        ("linear", 5, "adamw", "linear"),
        ("cosine", 5, "radam", "cosine"),
        ("linear", 5, "schedule_free", "constant"),  # which warms up by itself
        ("linear", "none", "schedule_free", "constant"),
    ],
)
def test_the_schedule_has_the_warmup(plan_of, schedule, warmup, optimizer, expected):
    grids = [{"warmup": warmup, "optimizer": optimizer}]
    (run,) = plan_of(MINIMAL, arguments={"lr_scheduler_type": schedule}, grids=grids).runs
    assert run.arguments["lr_scheduler_type"] == expected
    assert run.arguments["warmup_steps"] == (5 if warmup == 5 else 0)


def test_betas_of_the_run_reach_optimizers_that_name_them_otherwise(plan_of):
    grids = [{"optimizer": ["rmsprop", "sgd"], "adam_beta2": [0.98, 0.999]}]
    runs = plan_of(MINIMAL, arguments={"adam_beta1": 0.8}, grids=grids).runs
    expected = ["alpha=0.98", "alpha=0.999", "momentum=0.8", "momentum=0.8"]
    assert [run.arguments["optim_args"] for run in runs] == expected


def test_the_small_scale_stands_in_for_the_full_one(tmp_path):
    path = tmp_path / "grid.yaml"
    scale = {"arguments": {"max_steps": 10, "do_eval": True}, "seed": [7, 8], "test_metrics": None}
    content = {
        **MINIMAL,
        "arguments": {"max_steps": 1000, "fp16": True, "do_eval": True},
        "small": scale,
        "test_metrics": ["predict_bleu"],
    }
    path.write_text(json.dumps({**content, "grids": [{"v0": ["zeros", "random"], "seed": [1, 2, 3]}]}))
    full, small = read_plan(path), read_plan(path, small=True)
    assert (full.small, small.small) == (False, True)
    assert (full.test_metrics, small.test_metrics) == (("predict_bleu",), ())
    assert [(run.setting, run.seed) for run in small.runs] == list(
        zip(["no warmup", "random"] * 2, [7, 7, 8, 8], strict=True)
    )
    assert {run.seed for run in full.runs} == {1, 2, 3} and {run.arguments["max_steps"] for run in full.runs} == {1000}
    assert small.arguments["max_steps"] == 10 and "fp16" not in small.arguments
    assert small.command.endswith("--small") and not full.command.endswith("--small")
    path.write_text(json.dumps(MINIMAL))
    with pytest.raises(InputError, match="no small scale"):
        read_plan(path, small=True)


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": []}, "unknown key 'grid'; did you mean grids"),
        ({"grids": []}, "grids: needs at least one mapping"),
        ({"grids": [{}]}, "grids: needs at least one mapping"),
        ({"grids": [{"v0": ["zeros"]}, {"warmup": []}]}, "number 2: warmup has no values"),
        ({"grids": [{"v0": ["data_drivn"]}]}, "did you mean data_driven"),
        ({"grids": [{"warmup_steps": [5]}]}, "is set by the axis warmup"),
        ({"grids": [{"output_dir": ["x"]}]}, "output_dir is set by the comparison"),
        ({"grids": [{"v0": {"v0_init": "random", "output_dir": "x"}}]}, "output_dir is set by the comparison"),
        ({"grids": [{"v0": {"v0_init": "random", "seed": 3}}]}, "seed is 3 by the axis v0 and 42 by seed"),
        ({"grids": [{"hub_token": ["x", "y"]}]}, "hub_token is a secret, by which nothing is compared; give it in `arguments`"),
        ({"slurm": ["gpu"]}, "slurm: ['gpu'] must be a mapping"),
        ({"grids": [{"learning_rate": ["fast"]}]}, "learning_rate: 'fast'"),
        ({"grids": [{"learning_rate": [0]}]}, "learning_rate: 0"),
        ({"grids": [{"seed": [-1]}]}, "seed: -1"),
        ({"grids": [{"seed": [True]}]}, "seed: True"),
        ({"grids": [{"v0": "random", "optimizer": "sgd"}]}, "keeps no second moment"),
        ({"grids": [{"warmup": 5}], "arguments": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, "does no warmup"),
        ({"grids": [{"v0": [{"name": "a", "v0_init": "random"}, {"name": "a", "v0_init": "data_driven"}]}]}, "two settings are named 'a' but differ in v0_init"),
        ({"grids": [{"v0": "data_driven 10"}, {"v0": {"name": "data_driven 10", "v0_init": "random"}}]}, "two settings are named 'data_driven 10'"),
        ({"arguments": {"v0_scale": 1}}, "v0_scale is set by the axis v0"),
        ({"arguments": {"output-dir": "x"}}, "output_dir is set by the comparison"),
        ({"arguments": ["x"]}, "must be a mapping"),
        ({"arguments_file": "nowhere.yaml"}, "nowhere.yaml: No such file"),
        ({"script": "run_clmm"}, "there is no file run_clmm, here or in"),
        ({"script": None}, "script is missing"),
        ({"launch": "no_such_launcher x"}, "no program"),
        ({"launch": "python -X 'dev"}, "launch: \"python -X 'dev\" cannot be split into words (no closing quotation); close the quote"),
        ({"small": {"seeds": [1]}}, "unknown key 'seeds'; did you mean seed"),
        ({"test_metrics": 3}, "test_metrics: 3"),
        ({"metric": "eval_quality"}, "greater_is_better: true or false"),
        ({"greater_is_better": "yes"}, "greater_is_better: 'yes' must be true or false"),
        ({"confirm_seeds": -1}, "confirm_seeds: -1 must be"),
        ({"confirm_seeds": [41, 42]}, "give fresh ones, each once; the grids have [42]"),
        ({"confirm_seeds": [1, 1]}, "give fresh ones, each once"),
        ({"margin": "some"}, "margin: 'some'"),
        ({"margin": 0}, "margin: 0 must be"),
        ({"arguments": {"do_eval": False}}, "eval_loss is of an evaluation, and there is none: write do_eval: true"),
        ({"grids": [{"v0": [{"v0_init": "random", "learning_rate": 1e-3}], "learning_rate": [1e-2]}]}, "learning_rate is 0.001 by the axis v0 and 0.01 by learning_rate: set it in one"),
        ({"grids": [{"warmup": [{"name": "w", "v0_init": "random", "warmup_steps": 5}], "v0": ["zeros"]}]}, "v0_init is zeros by the axis v0 and random by warmup"),
        ({"grids": [{"optimizer": [{"name": "o", "optim": "adafactor", "warmup_steps": 9}], "warmup": [5]}]}, "warmup_steps is 5 by the axis warmup and 9 by optimizer"),
        ({"grids": [{"optimizer": [{"name": "o", "optim": "adamw_torch", "adam_beta2": 0.9}], "adam_beta2": [0.99]}]}, "adam_beta2 is 0.9 by the axis optimizer and 0.99 by adam_beta2"),
        ({"grids": [{"v0": "random", "optimizer": [{"name": "mysgd", "optim": "sgd"}]}]}, "v0_init=random with sgd, which keeps no second moment"),
        ({"grids": [{"v0": "random", "optimizer": [{"name": "l", "v0_optimizer": "pytorch_optimizer:Lion"}]}]}, "keeps no second moment"),
        ({"grids": [{"warmup": "trust_radius"}], "arguments": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, "does no warmup"),
    ],
)  # fmt: skip
def test_refusals_name_file_value_and_remedy(plan_of, changes, words):
    with pytest.raises(InputError) as error:
        plan_of(MINIMAL, **changes)
    assert words in str(error.value) and "grid.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("script: [", "cannot be parsed"),
        ("- a", "must be a mapping"),
        ("script: run_clm\nscript: run_clm\n", "'script' is given twice, again in line 2"),
        ("grids:\n  - v0: [zeros]\n    v0: [random]\n", "'v0' is given twice, again in line 3"),
        ("grids: [{v0: zeros}]", "script is missing"),
    ],
)
def test_files_that_cannot_be_read(plan_of, text, words):
    with pytest.raises(InputError, match=words):
        plan_of(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.yaml"):
        read_plan(tmp_path / "nowhere.yaml")


def test_a_user_s_script_is_found_beside_the_file_and_known_by_its_whole_path(plan_of, tmp_path):
    (tmp_path / "mine.py").write_text("")
    assert plan_of(MINIMAL, script="mine.py").script == str((tmp_path / "mine.py").resolve())


def test_what_is_asked_of_slurm_is_in_submitit_s_words(plan_of):
    text = "script: run_clm\narguments: {do_eval: true}\ngrids: [{v0: zeros}]\nslurm: {partition: gpu, time: 4:00:00}"
    assert plan_of(text).slurm == {"partition": "gpu", "time": "4:00:00"}


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("name", SCRIPT_MODULES)
def test_the_package_s_scripts_are_modules_that_say_who_they_are(name):
    """What `python -m`, `accelerate launch -m` and `torchrun -m` will find."""
    spec = importlib.util.find_spec(SCRIPT_MODULES[name])
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':\n    run_script(")


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ("python", ["-m"]),
        ("python -X dev", ["-X", "dev", "-m"]),
        ("torchrun --nproc_per_node 2", ["--nproc_per_node", "2", "-m"]),
        ("deepspeed --num_gpus 2", ["--num_gpus", "2", "--module"]),
    ],
)
def test_launchers_start_a_module_of_the_package_and_a_file_of_the_user_s(tmp_path, monkeypatch, launch, words):
    monkeypatch.setattr("shutil.which", lambda name: name)
    command = make_command(launch, "run_clm", {}, tmp_path)
    assert command[1:] == [
        *words,
        "hf_v0init.tasks.language_modeling.script",
        f"--output_dir={tmp_path}",
        "--v0_record_run=true",
    ]
    assert make_command(launch, "/mine/my.py", {}, tmp_path)[1:-2] == [*words[:-1], "/mine/my.py"]


@pytest.mark.slow
def test_a_named_script_runs_outside_of_a_checkout(tmp_path):
    command = make_command("python", "run_clm", {}, tmp_path / "out")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "error: no model: give --model_name_or_path" in done.stderr


def test_flags_are_written_so_that_scripts_read_them_back():
    from transformers import TrainingArguments

    from hf_v0init.tasks.script_support import parse_arguments

    flags = {
        "learning_rate": 1e-05, "max_steps": 7, "bf16": False, "do_eval": True, "eval_strategy": "no", "adam_beta2": 0.98,
        "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.25}, "label_names": ["a", "b"], "output_dir": "a b",
    }  # fmt: skip
    (parsed,) = parse_arguments((TrainingArguments,), make_flags(flags))
    assert {name: getattr(parsed, name) for name in flags} == flags


def test_runs_side_by_side_under_accelerate_get_ports_of_their_own(tmp_path):
    launch = "accelerate launch --num_processes 2"
    words = [make_command(launch, "run_clm", {}, tmp_path, jobs)[1:6] for jobs in (1, 2)]
    module = ["-m", "hf_v0init.tasks.language_modeling.script"]
    assert words[0] == ["launch", "--num_processes", "2", *module]
    assert words[1] == ["launch", "--num_processes", "2", "--main_process_port", "0"]
    own = make_command(f"{launch} --main_process_port 7", "run_clm", {}, tmp_path, jobs=2)
    assert own[1:6] == ["launch", "--num_processes", "2", "--main_process_port", "7"]


# ------------------------------------------------------------------------ what the flags make of a Trainer's optimizer

EXPECTED_OPTIMIZERS = {
    "adamw": ("AdamW", {"weight_decay": 0.1, "betas": (0.9, 0.98)}),
    "adam": ("Adam", {"weight_decay": 0.1, "betas": (0.9, 0.98), "decoupled_weight_decay": False}),
    "amsgrad": ("AdamW", {"amsgrad": True, "betas": (0.9, 0.98)}),
    "nadam": ("NAdam", {"decoupled_weight_decay": True, "betas": (0.9, 0.98)}),
    "radam": ("RAdam", {"decoupled_weight_decay": True, "betas": (0.9, 0.98)}),
    "rmsprop": ("RMSprop", {"alpha": 0.98, "weight_decay": 0.1}),
    "sgd": ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    "schedule_free": ("AdamWScheduleFree", {"warmup_steps": 4, "weight_decay": 0.1}),
    "adabelief": ("AdaBelief", {"betas": (0.9, 0.98), "weight_decouple": True, "eps": 1e-16}),
    "adabound": ("AdaBound", {"betas": (0.9, 0.98), "weight_decouple": True}),
    "adopt": ("ADOPT", {"betas": (0.9, 0.98), "weight_decouple": True}),
    "yogi": ("Yogi", {"betas": (0.9, 0.98), "weight_decouple": True}),
}


def make_trainer(run, tmp_path, gpt2, sequences):
    """The Trainer that a script would make of a run's flags."""
    from hf_v0init import V0InitTrainer, V0InitTrainingArguments
    from hf_v0init.tasks.script_support import parse_arguments

    flags = make_flags({**run.arguments, "output_dir": str(tmp_path), "use_cpu": True, "max_steps": 20})
    (arguments,) = parse_arguments((V0InitTrainingArguments,), flags)
    trainer = V0InitTrainer(model=gpt2, args=arguments, train_dataset=sequences)
    trainer.create_optimizer_and_scheduler(num_training_steps=20)
    return trainer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_word_makes_that_optimizer_with_the_run_s_settings(plan_of, tmp_path, gpt2, sequences, name):
    class_name, settings = EXPECTED_OPTIMIZERS[name]
    pytest.importorskip({"AdamWScheduleFree": "schedulefree"}.get(class_name, "torch"))
    if str(OPTIMIZERS[name].get("v0_optimizer")).startswith("pytorch_optimizer"):
        pytest.importorskip("pytorch_optimizer")
    v0 = "zeros" if name == "sgd" else "random 100"
    common = {"adam_beta2": 0.98, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    grids = [{"v0": v0, "optimizer": name, "warmup": 4, "learning_rate": 0.5}]
    (run,) = plan_of(MINIMAL, arguments=common, grids=grids).runs
    trainer = make_trainer(run, tmp_path, gpt2, sequences)
    group = trainer.optimizer.param_groups[0]
    assert type(trainer.optimizer).__name__ == class_name
    assert {key: tuple(group[key]) if key == "betas" else group[key] for key in settings} == settings
    rates = []
    for _ in range(6):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.lr_scheduler.step()
    warmed_up = [0.5] * 6 if name == "schedule_free" else [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert rates == pytest.approx(warmed_up)


@pytest.mark.parametrize(
    ("metric", "given", "expected"),
    [
        ("eval_loss", None, False),
        ("eval_perplexity", None, False),
        ("eval_accuracy", True, True),
        ("eval_frechet_distance", False, False),
        ("eval_loss", True, True),
    ],
)
def test_the_direction_of_the_metric_is_known_or_given(plan_of, metric, given, expected):
    changes = {"metric": metric} | ({} if given is None else {"greater_is_better": given})
    assert plan_of(MINIMAL, **changes).greater_is_better is expected


# ------------------------------------------------------------------------------------------- families, stages, names


def test_what_a_mapping_holds_is_used_and_decides_the_family(plan_of):
    """A flag may stand in any axis; a name decides nothing."""
    grids = [
        {"v0": [{"v0_init": "random", "learning_rate": 1e-3, "adam_beta2": 0.9}]},
        {"warmup": [{"name": "with v0", "v0_init": "random", "warmup_steps": 5}]},
        {"optimizer": [{"name": "mine", "optim": "adamw_torch", "warmup_steps": 9}]},
        {"warmup": [{"untuned_warmup": "linear"}]},
        {
            "optimizer": [
                {"name": "adamw", "optim": "adamw_torch", "weight_decay": 0.01},
                {"name": "other", "optim": "adafactor"},
            ]
        },
    ]
    runs = plan_of(MINIMAL, grids=grids).runs
    first = runs[0].arguments
    assert (first["learning_rate"], first["adam_beta2"], runs[0].learning_rate) == (1e-3, 0.9, 1e-3)
    assert runs[1].arguments["v0_init"] == "random" and runs[2].arguments["warmup_steps"] == 9
    assert [run.family for run in runs] == ["v0", "v0 + warmup", "warmup", "warmup", "no warmup", "other"]
    assert [run.setting for run in runs] == [
        "random learning_rate=0.001 adam_beta2=0.9", "v0_init=random + warmup with v0", "warmup warmup_steps=9 + mine",
        "warmup untuned_warmup=linear", "no warmup", "other",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("axis", "value", "setting", "family"),
    [
        ("v0", {"name": "", "v0_init": "random"}, "random", "v0"),
        ("v0", {"name": "zeros", "v0_init": "random"}, "zeros", "v0"),
        ("warmup", {"name": "none", "warmup_steps": 5}, "warmup none", "warmup"),
        ("optimizer", {"name": "adamw", "optim": "adafactor"}, "adamw", "adamw"),
    ],
)
def test_a_name_decides_nothing(plan_of, axis, value, setting, family):
    """None of these lands among the runs without a warmup."""
    plain, run = plan_of(MINIMAL, grids=[{"warmup": ["none"]}, {axis: [value]}, {"warmup": [7]}]).runs[:2]
    assert (plain.setting, plain.family, run.setting, run.family) == ("no warmup", "no warmup", setting, family)


def test_a_secret_in_a_mapping_is_used_and_named_nowhere(plan_of):
    grids = [{"v0": [{"v0_init": "random", "hub_token": "s3cret", "lr_scheduler_kwargs": {"api_key": "s3cret"}}]}]
    grids += [{"warmup": [{"warmup_steps": 4, "db_password": "s3cret"}]}]
    plan = plan_of(MINIMAL, grids=grids)
    assert [run.setting for run in plan.runs] == [
        "random hub_token=*** lr_scheduler_kwargs={'api_key': '***'}", "warmup warmup_steps=4 db_password=***",
    ]  # fmt: skip
    assert plan.runs[0].arguments["hub_token"] == plan.runs[1].arguments["db_password"] == "s3cret"
    assert "s3cret" not in json.dumps(plan.to_dict()) + "".join(run.name for run in plan.runs)
    for refused in (
        {"v0_init": "none", "hub_token": "s3cret"},
        {"v0_init": "random", "output_dir": "x", "hub_token": "s3cret"},
    ):
        with pytest.raises(InputError) as error:
            plan_of(MINIMAL, grids=[{"v0": [refused]}])
        assert "s3cret" not in str(error.value)


def test_other_optimizers_are_families_by_name_and_flags_are_conditions(plan_of):
    grids = [
        {"optimizer": ["adam", "radam"], "v0": ["zeros", "random"], "adam_beta2": [0.98, 0.999]},
        {"optimizer": "adam", "warmup": 5, "v0_include_bias_and_norm": [True]},
    ]
    runs = plan_of(MINIMAL, grids=grids, arguments={"adam_beta2": 0.98}).runs
    assert {run.family for run in runs} == {"no warmup", "v0", "radam", "radam, v0", "warmup"}
    assert {run.condition for run in runs} == {"", "adam_beta2=0.999"}
    assert runs[-1].condition == "" and runs[-1].setting == "warmup 5 + adam + v0_include_bias_and_norm=True"


@pytest.mark.parametrize(
    ("grids", "changes", "stage", "seeds"),
    [
        ([{"v0": ["zeros", "random"], "seed": [3, 4]}], {}, "confirm", ()),  # nothing is to be chosen
        ([{"v0": ["zeros", "random"], "seed": [3, 4]}], {"confirm_seeds": 2}, "tune", (5, 6)),
        ([{"v0": ["zeros", "random", "data_driven"], "seed": [3]}], {}, "tune", (4, 5, 6, 7, 8)),
        ([{"learning_rate": [1e-3, 1e-2]}], {}, "tune", (43, 44, 45, 46, 47)),
        ([{"learning_rate": [1e-3, 1e-2]}], {"confirm_seeds": [7, 9]}, "tune", (7, 9)),
        ([{"learning_rate": [1e-3, 1e-2]}], {"confirm_seeds": 0}, "tune", ()),
    ],
)
def test_the_seeds_that_choose_and_those_that_judge(plan_of, grids, changes, stage, seeds):
    plan = plan_of(MINIMAL, grids=grids, **changes)
    assert {run.stage for run in plan.runs} == {stage} and plan.confirm_seeds == seeds


@pytest.mark.parametrize(("given", "margin"), [("1%", (0.01, True)), (" .5 %", (0.005, True)), (0.03, (0.03, False))])
def test_the_margin_is_relative_or_in_the_metric_s_unit(plan_of, given, margin):
    plan = plan_of(MINIMAL, margin=given)
    assert (plan.margin, plan.margin_is_relative) == pytest.approx(margin)
