import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_v0init import InputError, V0InitArguments, V0InitSeq2SeqTrainingArguments, V0InitTrainingArguments
from hf_v0init.settings import V0Plan, read_v0_arguments

FLAGS = list(V0InitArguments.__dataclass_fields__)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(TrainingArguments, V0InitTrainingArguments), (Seq2SeqTrainingArguments, V0InitSeq2SeqTrainingArguments)],
)
def test_ours_are_theirs_and_the_v0_flags(tmp_path, theirs, ours):
    arguments = ours(str(tmp_path), learning_rate=0.5, v0_init="random")  # output_dir still comes first
    assert isinstance(arguments, theirs) and isinstance(arguments, V0InitArguments)
    assert (arguments.output_dir, arguments.learning_rate, arguments.v0_init) == (str(tmp_path), 0.5, "random")
    stock = theirs(str(tmp_path), learning_rate=0.5).to_dict()
    mine = arguments.to_dict()
    differing = {key for key in stock if stock[key] != mine[key]} - {"logging_dir"}
    assert differing == set()
    assert set(mine) - set(stock) == set(FLAGS)


def test_the_defaults_leave_adam_alone():
    assert V0InitArguments() == V0InitArguments(v0_init="zeros") and V0InitArguments().resolve(100) == V0Plan()


@pytest.mark.parametrize("strategy", ["random", "data_driven", "first_gradient"])
def test_a_strategy_alone_is_a_linear_decay_over_two_thirds_of_training(strategy):
    plan = V0InitArguments(v0_init=strategy).resolve(100)
    assert (plan.init, plan.decay, plan.decay_steps, plan.scale) == (strategy, "linear", 66, None)
    assert V0InitArguments(v0_init=strategy).resolve().decay_steps == pytest.approx(2 / 3)  # of a run of unknown length
    assert plan.include_bias_and_norm and plan.keeps_plateau
    assert plan.estimator == ("minibatch" if strategy == "data_driven" else None)


@pytest.mark.parametrize(
    ("given", "scale", "include"),
    [
        ({"v0_init": "random", "v0_decay": "beta2"}, 100.0, False),
        ({"v0_init": "data_driven", "v0_decay": "beta2"}, 1.0, False),
        ({"v0_init": "first_gradient", "v0_scale": 3}, 3.0, False),
        ({"v0_init": "data_driven", "v0_estimator": "per_sample"}, 1.0, False),
        ({"v0_init": "data_driven", "v0_preset": "paper", "v0_scale": 1}, 1.0, False),  # says the same twice
        ({"v0_init": "random", "v0_preset": "paper"}, 100.0, False),
        ({"v0_init": "random", "v0_preset": "authors_code"}, 200.0, False),
        ({"v0_init": "data_driven", "v0_preset": "authors_code"}, 1.0, True),
    ],
)
def test_a_size_or_the_paper_means_decay_by_beta2(given, scale, include):
    plan = V0InitArguments(**given).resolve(100)
    assert (plan.decay, plan.decay_steps, plan.scale, plan.include_bias_and_norm) == ("beta2", None, scale, include)
    by_sample = plan.init == "data_driven" and ("v0_preset" in given or "v0_estimator" in given)
    assert plan.num_samples == (5000 if by_sample else None) and not plan.keeps_plateau


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"v0_preset": "paper", "v0_estimator": "minibatch"}, "v0_preset=paper has v0_estimator=per_sample"),
        ({"v0_preset": "paper", "v0_decay": "linear"}, "v0_preset=paper has v0_decay=beta2"),
        ({"v0_preset": "paper", "v0_decay_steps": 9}, "v0_preset=paper has v0_decay_steps=None"),
        ({"v0_preset": "authors_code", "v0_scale": 3.0}, "v0_preset=authors_code has v0_scale=1.0"),
        ({"v0_preset": "paper", "v0_init": "first_gradient"}, "v0_init=first_gradient|first_gradient, which"),
        ({"v0_init": "xavier"}, "v0_init='xavier'"),
        ({"v0_init": "auto"}, "v0_init='auto'"),
        ({"v0_decay": "exponential"}, "v0_decay='exponential'"),
        ({"v0_scale": -1.0}, "v0_scale=-1"),
        ({"untuned_warmup": "cosine"}, "untuned_warmup='cosine'"),
        ({"v0_decay": "linear", "v0_estimator": "per_sample"}, "v0_estimator=per_sample with v0_decay=linear"),
        ({"v0_decay": "linear", "v0_scale": 2.0}, "v0_scale=2.0 with v0_decay=linear"),
        ({"v0_scale": 2.0, "v0_decay_steps": 9}, "v0_scale=2.0 and v0_decay_steps=9"),
        ({"v0_num_samples": 9}, "v0_num_samples=9"),
        ({"v0_num_samples": 0}, "v0_num_samples=0"),
        ({"v0_init": "zeros", "v0_decay_steps": 9}, "v0_decay_steps=9 with v0_init=zeros"),
        ({"v0_estimation_steps": 0}, "v0_estimation_steps=0"),
        ({"v0_init": "random", "v0_estimation_steps": 2}, "v0_estimation_steps=2 with v0_init=random"),
        ({"v0_decay_steps": 0}, "v0_decay_steps=0"),
        ({"v0_decay_steps": 2.5}, "v0_decay_steps=2.5"),
        ({"v0_decay_steps": -0.5}, "v0_decay_steps=-0.5"),
        ({"v0_decay_steps": float("nan")}, "v0_decay_steps=nan"),
        ({"v0_decay_steps": True}, "v0_decay_steps=True"),
        ({"v0_scale": float("nan")}, "v0_scale=nan"),
        ({"v0_scale": float("inf")}, "v0_scale=inf"),
        ({"v0_stats_batch_size": 0}, "v0_stats_batch_size=0"),
        ({"v0_estimator": "median"}, "v0_estimator='median'"),
        ({"v0_preset": "article"}, "v0_preset='article'"),
    ],
)
def test_what_contradicts_itself_is_refused(given, words):
    with pytest.raises(InputError, match=words) as caught:
        V0InitArguments(**{"v0_init": "data_driven"} | given)
    assert "\n" not in str(caught.value)


def test_command_line_gives_every_flag_its_type():
    parsed = HfArgumentParser(V0InitArguments).parse_args_into_dataclasses(
        "--v0_init data_driven --v0_scale 2.5 --v0_num_samples 100 --v0_estimator per_sample --v0_stats_batch_size 8 "
        "--v0_seed 3 --v0_include_bias_and_norm True --v0_decay beta2".split()
    )[0]
    assert parsed == V0InitArguments(
        v0_init="data_driven", v0_scale=2.5, v0_num_samples=100, v0_estimator="per_sample", v0_stats_batch_size=8, v0_seed=3,
        v0_include_bias_and_norm=True, v0_decay="beta2",
    )  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_help_states_a_default(flag):
    assert "Default:" in V0InitArguments.__dataclass_fields__[flag].metadata["help"]


def test_decay_steps_give_the_scale_of_the_closed_form():
    plan = V0InitArguments(v0_init="data_driven", v0_decay="beta2", v0_decay_steps=100).resolve()
    assert plan.scale is None and plan.keeps_plateau
    assert plan.get_scale(0.98) == pytest.approx((1 / 0.81 - 1) * (0.98**-100 - 1), rel=1e-12)
    plan = V0InitArguments(v0_init="data_driven", v0_decay="beta2", v0_decay_steps=0.25).resolve()
    with pytest.raises(InputError, match=r"v0_decay_steps=0\.25"):
        plan.get_scale(0.98)


@pytest.mark.parametrize(
    ("text", "value", "steps"),
    [("200", 200, 200), ("0.25", 0.25, 150), ("0.001", 0.001, 1), ("1", 1, 1), ("auto", "auto", "auto")],
)
def test_decay_steps_below_one_are_a_share_of_the_run(text, value, steps):
    """As transformers' own warmup_steps: rounded up to whole steps. What the user wrote stays as written."""
    (arguments,) = HfArgumentParser(V0InitArguments).parse_args_into_dataclasses(
        ["--v0_init", "data_driven", "--v0_decay_steps", text, "--v0_seed", "3"]
    )
    assert arguments.v0_decay_steps == value
    for max_steps, expected in ((600, steps), (None, value), (-1, value)):
        resolved = arguments.resolve(max_steps).decay_steps
        assert resolved == expected and isinstance(resolved, type(expected))
    assert arguments.v0_decay_steps == value
    if text != "auto":
        stock = TrainingArguments("out", max_steps=600, warmup_steps=value, use_cpu=True)
        assert stock.get_warmup_steps(600) == steps


def test_settings_are_read_from_any_object_that_has_them():
    class Theirs:
        v0_init, v0_scale = "random", 7.0

    assert read_v0_arguments(Theirs()) == V0InitArguments(v0_init="random", v0_scale=7.0)
    assert read_v0_arguments(object()) == V0InitArguments()
    with pytest.raises(InputError):
        read_v0_arguments(type("Bad", (), {"v0_init": "newton"})())
