"""Flags from files and command lines, exit status, output folders, logging."""

import json
import logging
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from script_runs import quiet_logging  # noqa: F401
from transformers import TrainingArguments

from hf_v0init.errors import InputError
from hf_v0init.tasks import script_support
from hf_v0init.tasks.output_folder import find_checkpoint_to_resume, remove_what_is_stale
from hf_v0init.tasks.script_support import parse_arguments, run_script, start_logging


@dataclass
class ToyArguments:
    rate: float = field(default=0.5, metadata={"help": "A rate, in nats."})
    steps: int = 3
    mode: str = field(default="soft", metadata={"choices": ["soft", "hard", "no"]})
    keep: bool = True
    name: str | None = "x"
    words: list[str] | None = None
    sizes: list[int] = field(default_factory=lambda: [1])

    def __post_init__(self):
        if self.steps == 13:
            raise ValueError("steps=13:\n  unlucky;\n  take another")


@dataclass
class NeedyArguments:
    place: str


def parse_toy(*argv):
    return parse_arguments([ToyArguments], list(argv))[0]


@pytest.fixture
def config(tmp_path):
    def write(text, name="flags.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_a_yaml_file_sets_flags_of_every_kind_and_the_command_line_overrides_them(config):
    path = config("rate: 1e-3\nsteps: 7\nmode: no\nkeep: false\nname: null\nwords: [a, b]\nsizes: [2, 3]\n")
    parsed = parse_toy(path, "--steps", "8")
    assert parsed == ToyArguments(rate=0.001, steps=8, mode="no", keep=False, name=None, words=["a", "b"], sizes=[2, 3])
    assert isinstance(parsed.rate, float)
    # `key=value` and lists, too
    assert parse_toy(path, "--steps=9", "--sizes", "4", "5").sizes == [4, 5]


def test_a_json_file_and_hyphens_in_its_keys(config):
    path = config(json.dumps({"learning-rate": 0.25, "output_dir": "o", "use_cpu": True}), "flags.json")
    toy, training = parse_arguments([ToyArguments, TrainingArguments], [path, "--rate", "-1e-3"])
    assert (toy.rate, training.learning_rate, training.output_dir) == (-0.001, 0.25, "o")


def test_transformers_flags_in_yaml_keep_their_meaning(config):
    path = config(
        "output_dir: o\nuse_cpu: yes\neval_strategy: no\nsave_strategy: no\nlearning_rate: 2e-3\nadam_epsilon: 1e-8\n"
        "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 2}\nreport_to: [none]\nlabel_names: [labels]\nwarmup_steps: 200\n"
    )
    (training,) = parse_arguments([TrainingArguments], [path])
    assert training.eval_strategy == "no" and training.save_strategy == "no"
    assert training.learning_rate == 0.002 and training.adam_epsilon == 1e-8 and training.warmup_steps == 200
    assert training.lr_scheduler_kwargs == {"num_cycles": 2} and training.label_names == ["labels"]


def test_a_required_flag_may_come_from_the_file(config):
    assert parse_arguments([NeedyArguments], [config("place: here")])[0].place == "here"


@pytest.mark.parametrize(
    ("file_text", "argv", "expected"),
    [
        (None, ["--stepz", "3"], ["--stepz", "did you mean --steps?"]),
        (None, ["--steps", "many"], ["--steps", "'many'", "int"]),
        (None, ["--steps"], ["--steps", "expected one argument"]),
        (None, ["--mode", "firm"], ["--mode", "'firm'", "soft", "hard"]),
        (None, ["--keep", "perhaps"], ["perhaps"]),
        (None, ["--steps", "13"], ["steps=13: unlucky; take another"]),
        (None, ["--rate", "1", "stray"], ["unknown: stray"]),
        (None, ["flags.txt"], ["'flags.txt'", ".yaml"]),
        (None, ["missing.yaml"], ["missing.yaml", "No such file"]),
        ("setps: 3", [], ["setps"]),
        ("steps: 2.5", [], ["--steps", "'2.5'"]),
        ("steps: [1, 2]", [], ["2"]),
        ("mode: firm", [], ["--mode", "'firm'"]),
        ("", [], ["must be a mapping"]),
        ("a: [1", [], ["flags.yaml", "line"]),
    ],
)
def test_bad_flags_are_an_input_error_of_one_line(config, file_text, argv, expected):
    argv = argv if file_text is None else [config(file_text), *argv]
    with pytest.raises(InputError) as caught:
        parse_toy(*argv)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_missing_required_flag_and_not_utf8(config, tmp_path):
    with pytest.raises(InputError, match="place"):
        parse_arguments([NeedyArguments], [])
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(InputError, match=r"latin\.yaml"):
        parse_toy(str(tmp_path / "latin.yaml"))


def test_processes_that_are_not_joined_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    script_support._require_joined_processes(SimpleNamespace(world_size=2))
    with pytest.raises(InputError, match=r"started 2 processes.*--use_cpu"):
        script_support._require_joined_processes(SimpleNamespace(world_size=1))


# ------------------------------------------------------------------------------------------------ exit status


def run_with(monkeypatch, raised):
    monkeypatch.setattr(sys, "argv", ["script.py", "--a", "b"])

    def main(argv):
        assert argv == ["--a", "b"]
        if raised is not None:
            raise raised

    run_script(main)


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (InputError("scale=-1:\n must be > 0"), 2, "error: scale=-1: must be > 0\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_bad_input_and_interruption_end_with_one_line(monkeypatch, capsys, raised, status, line):
    with pytest.raises(SystemExit) as caught:
        run_with(monkeypatch, raised)
    assert caught.value.code == status
    assert capsys.readouterr() == ("", line)


def test_defects_keep_their_traceback_and_success_returns(monkeypatch):
    with pytest.raises(ValueError, match="a defect"):
        run_with(monkeypatch, ValueError("a defect"))
    assert run_with(monkeypatch, None) is None


def test_another_process_lets_the_main_one_speak_first(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(script_support.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        run_with(monkeypatch, InputError("no such file"))
    assert caught.value.code == 2
    assert waited == [script_support.SECONDS_FOR_MAIN_PROCESS_TO_REPORT]
    assert capsys.readouterr().err == "error: no such file (process 1)\n"


# --------------------------------------------------------------------------------------------- output folder


def make_arguments(folder, resume=None):
    return SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=resume, process_index=0)


def make_checkpoint(folder):
    """The least that a run can be resumed from: weights and the Trainer's state."""
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": int(folder.name.split("-")[1])}))


def test_which_checkpoint_a_run_continues_from(tmp_path):
    folder = tmp_path / "out"
    assert find_checkpoint_to_resume(make_arguments(folder), overwrite=False) is None
    with pytest.raises(InputError, match="holds no checkpoint"):
        find_checkpoint_to_resume(make_arguments(folder, "true"), overwrite=False)
    for step in (5, 10):
        make_checkpoint(folder / f"checkpoint-{step}")
    last = str(folder / "checkpoint-10")
    assert find_checkpoint_to_resume(make_arguments(folder), overwrite=False) == last
    assert find_checkpoint_to_resume(make_arguments(folder, "True"), overwrite=True) == last
    assert find_checkpoint_to_resume(make_arguments(folder), overwrite=True) is None
    first = str(folder / "checkpoint-5")
    assert find_checkpoint_to_resume(make_arguments(folder, first), overwrite=False) == first
    with pytest.raises(InputError, match="no folder nowhere"):
        find_checkpoint_to_resume(make_arguments(folder, "nowhere"), overwrite=False)
    # a checkpoint from elsewhere, into a folder of its own, but not beside files of others
    other = tmp_path / "other"
    assert find_checkpoint_to_resume(make_arguments(other, first), overwrite=False) == first
    other.mkdir()
    (other / "model.safetensors").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        find_checkpoint_to_resume(make_arguments(other), overwrite=False)


def test_broken_checkpoints_are_passed_over_and_named(tmp_path, caplog):
    for step in (5, 10):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_s')
    for wanted in (None, "true"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_v0init"):
            found = find_checkpoint_to_resume(make_arguments(tmp_path, wanted), overwrite=False)
        assert found == str(tmp_path / "checkpoint-5")
        assert "checkpoint-10 (trainer_state.json is damaged)" in caplog.text
    with pytest.raises(InputError, match=r"checkpoint-10: trainer_state.json is damaged.*valid.*checkpoint-5$"):
        find_checkpoint_to_resume(make_arguments(tmp_path, str(tmp_path / "checkpoint-10")), overwrite=False)
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{")
    for wanted in (None, "true"):  # a run that was killed in its first save starts anew where it stood
        assert find_checkpoint_to_resume(make_arguments(tmp_path, wanted), overwrite=False) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]


@pytest.mark.parametrize("with_checkpoints", [False, True])
def test_what_a_new_training_makes_untrue_is_removed_and_nothing_else(tmp_path, with_checkpoints):
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-best", "runs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    stale = (
        "all_results.json eval_results.json generated_predictions.txt v0_init.json README.md trainer_state.json".split()
    )
    kept = ["checkpoint-7", "notes.txt", "model.safetensors", "run_log.jsonl"]
    for name in [*stale, *kept]:
        (tmp_path / name).write_text("")
    remove_what_is_stale(tmp_path, with_checkpoints)
    checkpoints = [] if with_checkpoints else ["checkpoint-10", "checkpoint-5"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, *checkpoints, "checkpoint-best", "runs"])
    remove_what_is_stale(tmp_path / "missing", with_checkpoints)


def test_logging_goes_to_stdout_at_the_level_asked_for(capsys, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    start_logging(arguments)
    logging.getLogger("hf_v0init").info("seen")
    logging.getLogger("transformers.toy").warning("seen too")
    logging.getLogger("transformers.toy").info("hidden")
    arguments.log_level = "error"
    start_logging(arguments)
    logging.getLogger("hf_v0init").warning("hidden")
    arguments.log_level = "info"
    start_logging(arguments)
    logging.getLogger("transformers.toy").info("asked for")
    out, err = capsys.readouterr()
    assert "seen" in out and "seen too" in out and "asked for" in out and "hidden" not in out
    assert err == ""
