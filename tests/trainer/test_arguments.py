import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_v0init import InputError, V0InitArguments, V0InitSeq2SeqTrainingArguments, V0InitTrainingArguments
from hf_v0init.settings import read_v0_arguments

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


def test_the_defaults_leave_adam_alone_and_measure_the_runs_own_steps():
    arguments = V0InitArguments()
    assert (arguments.v0_init, arguments.v0_num_samples, arguments.v0_estimator) == ("zeros", 5000, "minibatch")
    assert [V0InitArguments(v0_init=s).get_v0_scale(0.999) for s in ("random", "data_driven", "first_gradient")] == [
        100,
        1,
        1,
    ]


def test_the_papers_preset_is_its_settings():
    scales = {s: V0InitArguments(v0_init=s, v0_preset="paper").get_v0_scale(0.999) for s in ("random", "data_driven")}
    assert scales == {"random": 100.0, "data_driven": 1.0}
    paper = V0InitArguments(v0_init="data_driven", v0_preset="paper", v0_scale=1)  # says the same twice
    assert (paper.v0_estimator, paper.v0_num_samples, paper.v0_include_bias_and_norm) == ("per_sample", 5000, False)
    code = {s: V0InitArguments(v0_init=s, v0_preset="authors_code") for s in ("random", "data_driven")}
    assert code["random"].get_v0_scale(0.999) == 200.0 and code["data_driven"].v0_include_bias_and_norm
    with pytest.raises(InputError, match="v0_preset=paper has v0_estimator=per_sample, and minibatch was given"):
        V0InitArguments(v0_init="data_driven", v0_preset="paper", v0_estimator="minibatch")
    given = HfArgumentParser(V0InitArguments).parse_args_into_dataclasses(["--v0_preset", "paper"])[0]
    assert given == V0InitArguments(v0_preset="paper")


def test_command_line_gives_every_flag_its_type():
    parsed = HfArgumentParser(V0InitArguments).parse_args_into_dataclasses(
        "--v0_init data_driven --v0_scale 2.5 --v0_num_samples 100 --v0_estimator minibatch --v0_stats_batch_size 8 "
        "--v0_seed 3 --v0_include_bias_and_norm --v0_estimation_steps 4".split()
    )[0]
    assert parsed == V0InitArguments(
        v0_init="data_driven", v0_scale=2.5, v0_num_samples=100, v0_estimator="minibatch", v0_stats_batch_size=8, v0_seed=3,
        v0_include_bias_and_norm=True, v0_estimation_steps=4,
    )  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_help_states_a_default(flag):
    text = V0InitArguments.__dataclass_fields__[flag].metadata["help"]
    assert "Default:" in text and len(text) > 60


def test_help_names_the_equations_and_units():
    texts = {flag: V0InitArguments.__dataclass_fields__[flag].metadata["help"] for flag in FLAGS}
    assert "eq. 10" in texts["v0_init"] and "eq. 11" in texts["v0_init"]
    assert "dimensionless" in texts["v0_scale"] and "samples" in texts["v0_num_samples"]
    assert "m(t) = 1 / sqrt(1 + r * beta2^t / (1 - beta2^t))" in texts["v0_decay_steps"]


def test_warmup_steps_give_the_scale_of_the_closed_form():
    arguments = V0InitArguments(v0_init="data_driven", v0_decay_steps=100)
    assert arguments.get_v0_scale(0.98) == pytest.approx((1 / 0.81 - 1) * (0.98**-100 - 1), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "value", "steps"), [("200", 200, 200), ("0.25", 0.25, 150), ("0.001", 0.001, 1), ("1", 1, 1)]
)
def test_warmup_steps_below_one_are_a_share_of_the_run(text, value, steps):
    """As transformers' own warmup_steps: rounded up to whole steps."""
    (arguments,) = HfArgumentParser(V0InitArguments).parse_args_into_dataclasses(
        ["--v0_init", "data_driven", "--v0_decay_steps", text, "--v0_seed", "3"]
    )
    assert arguments.v0_decay_steps == value and type(arguments.v0_decay_steps) is type(value)
    resolved = arguments.resolve(600)
    assert resolved == V0InitArguments(v0_init="data_driven", v0_decay_steps=steps, v0_seed=3)
    assert type(resolved.v0_decay_steps) is int and arguments.v0_decay_steps == value
    assert (
        resolved.resolve(100) is resolved
        and arguments.resolve(None) is arguments
        and arguments.resolve(-1) is arguments
    )
    stock = TrainingArguments("out", max_steps=600, warmup_steps=value, use_cpu=True)
    assert stock.get_warmup_steps(600) == steps


def test_a_share_of_a_run_of_unknown_length_gives_no_scale():
    arguments = V0InitArguments(v0_init="data_driven", v0_decay_steps=0.25)
    with pytest.raises(InputError, match=r"v0_decay_steps=0\.25 is a share of the run, whose length is not known here"):
        arguments.get_v0_scale(0.98)


def test_settings_are_read_from_any_object_that_has_them():
    class Theirs:
        v0_init, v0_scale = "random", 7.0

    assert read_v0_arguments(Theirs()) == V0InitArguments(v0_init="random", v0_scale=7.0)
    assert read_v0_arguments(object()) == V0InitArguments()
    with pytest.raises(InputError):
        read_v0_arguments(type("Bad", (), {"v0_init": "newton"})())
