"""scripts/run_translation.py from end to end on number words, and that bad input ends in one line and status 2."""

import gzip
import json
import random
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from huggingface_hub import RepoCard
from loopback_hub import LoopbackHub
from safetensors.torch import load_file
from script_runs import ROOT, TORCHRUN, load_script, quiet_logging, read_results, refuse, start, to_argv  # noqa: F401
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, NllbTokenizer

from hf_v0init.tasks.whole_weights import average_checkpoints

SCRIPT = ROOT / "scripts" / "run_translation.py"
GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

TINY = {
    "config_overrides": "d_model=32,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=32,decoder_ffn_dim=32,dropout=0",
    "vocab_size": 300,
    "max_source_length": 16,
    "max_target_length": 16,
    "per_device_train_batch_size": 16,
    "seed": 3,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def run_translation():
    return load_script("translate")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """Flags that name parallel files, some gzipped: 200 pairs for training, 21 for validation and for test."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    flags = {}
    for role, size in (("train", 200), ("validation", 21), ("test", 21)):
        digits = [[rng.randrange(10) for _ in range(rng.randint(1, 4))] for _ in range(size)]
        for side, words in (("source", GERMAN), ("target", ENGLISH)):
            text = "".join(" ".join(words[d] for d in row) + "\n" for row in digits).encode()
            path = folder / (f"{role}.{side}.gz" if side == "source" else f"{role}.{side}")
            path.write_bytes(gzip.compress(text) if side == "source" else text)
            flags[f"{role}_{side}_file"] = str(path)
    return flags


def test_trains_translates_averages_and_saves(run_translation, data, tmp_path):
    flags = {
        **TINY, **data, "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache",
        "do_train": True, "do_eval": True, "do_predict": True, "max_steps": 240, "learning_rate": 5e-3,
        "lr_scheduler_type": "inverse_sqrt", "adam_beta2": 0.98, "v0_init": "data_driven", "v0_decay": "beta2",
        "max_tokens_per_batch": 100, "label_smoothing_factor": 0.1, "save_steps": 40, "save_total_limit": 3,
        "average_checkpoints": 3, "num_beams": 3, "length_penalty": 1.5, "predict_with_generate": True,
        "source_lang": "de", "target_lang": "en",
    }  # fmt: skip
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump({**TINY, "max_steps": 5}))
    given = {name: value for name, value in flags.items() if TINY.get(name) != value}
    run_translation.main([str(tmp_path / "flags.yaml"), *to_argv(given)])

    out = tmp_path / "out"
    results = read_results(out)
    assert results["eval_bleu"] > 15  # an untrained model has 0
    assert results["predict_bleu"] > 15
    assert results["eval_loss"] < 1.0  # and ln(vocabulary) = 5.7
    assert (results["train_samples"], results["eval_samples"], results["predict_samples"]) == (200, 21, 21)
    assert results["predict_bleu_signature"].startswith("nrefs:1|")

    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    assert [folder.name for folder in checkpoints] == ["checkpoint-160", "checkpoint-200", "checkpoint-240"]
    saved = load_file(out / "model.safetensors")
    average = average_checkpoints(AutoModelForSeq2SeqLM.from_pretrained(out), checkpoints)
    assert saved.keys() <= average.keys()
    assert all(torch.equal(saved[name], average[name]) for name in saved)

    # what was saved translates as the script did
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForSeq2SeqLM.from_pretrained(out)
    assert (model.generation_config.num_beams, model.generation_config.length_penalty) == (3, 1.5)
    sources = gzip.decompress(Path(data["test_source_file"]).read_bytes()).decode().splitlines()
    predictions = (out / "generated_predictions.txt").read_text().splitlines()
    assert len(predictions) == 21
    for source, prediction in zip(sources[:4], predictions, strict=False):
        generated = model.generate(**tokenizer(source, return_tensors="pt"))
        assert tokenizer.decode(generated[0], skip_special_tokens=True) == prediction

    report = json.loads((out / "v0_init.json").read_text())
    assert report["strategy"] == "data_driven"
    card = (out / "README.md").read_text()
    assert "hf_v0init" in card
    assert "train.source.gz" in card


def test_the_second_start_reads_the_tokenized_data_from_the_cache(run_translation, data, tmp_path):
    flags = {**TINY, **data, "do_train": True, "max_steps": 1, "save_strategy": "no", "cache_dir": tmp_path / "cache"}
    folder = tmp_path / "cache" / "hf_v0init"

    def run(name, **changes) -> dict:
        run_translation.main(to_argv({**flags, "output_dir": tmp_path / name, **changes}))
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    first = run("a")
    assert len(first) == 1
    assert run("b") == first
    assert len(run("d", max_source_length=7)) == 2
    assert len(run("e", source_prefix="translate: ")) == 3


def test_resume_is_found_and_equals_a_straight_run(run_translation, data, tmp_path):
    flags = {
        **TINY, **data, "do_train": True, "max_steps": 16, "save_steps": 9, "max_tokens_per_batch": 128,
        "v0_init": "random", "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    run_translation.main(to_argv({**flags, "output_dir": tmp_path / "straight"}))
    (tmp_path / "stopped").mkdir()
    (tmp_path / "straight" / "checkpoint-9").rename(tmp_path / "stopped" / "checkpoint-9")
    run_translation.main(to_argv({**flags, "output_dir": tmp_path / "stopped"}))
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    history = json.loads((tmp_path / "stopped" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 17))


@pytest.mark.parametrize("layout", ["jsonl", "csv", "tabs", "translation"])
def test_other_layouts_give_the_same_run(run_translation, data, tmp_path, layout):
    sources = gzip.decompress(Path(data["train_source_file"]).read_bytes()).decode().splitlines()
    targets = Path(data["train_target_file"]).read_text().splitlines()
    pairs = list(zip(sources, targets, strict=True))
    texts = {
        "jsonl": "".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in pairs),
        "csv": "de,en\n" + "".join(f"{s},{t}\n" for s, t in pairs),
        "tabs": "".join(f"{s}\t{t}\n" for s, t in pairs),
        "translation": "".join(json.dumps({"translation": {"de": s, "en": t}}) + "\n" for s, t in pairs),
    }
    suffix = {"csv": ".csv", "tabs": ".txt"}.get(layout, ".json")
    path = tmp_path / f"train{suffix}"
    path.write_text(texts[layout])
    flags = {**TINY, "do_train": True, "max_steps": 2, "save_strategy": "no", "cache_dir": tmp_path / "cache"}
    flags |= {"source_lang": "de", "target_lang": "en"}
    run_translation.main(to_argv({**flags, "train_file": path, "output_dir": tmp_path / "a"}))
    parallel = {name: value for name, value in data.items() if name.startswith("train")}
    run_translation.main(to_argv({**flags, **parallel, "output_dir": tmp_path / "b"}))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_data_set_by_name_is_read_by_its_splits(run_translation, tmp_path):
    """A folder stands for the Hub: `datasets` takes both by the same argument."""
    folder = tmp_path / "named"
    folder.mkdir()
    for split, size in (("train", 40), ("validation", 8), ("test", 6)):
        rows = [{"translation": {"de": GERMAN[i % 10], "en": ENGLISH[i % 10]}} for i in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {**TINY, "dataset_name": folder, "source_lang": "de", "target_lang": "en", "max_steps": 2}
    flags |= {"do_train": True, "do_eval": True, "do_predict": True, "max_predict_samples": 5, "save_strategy": "no"}
    run_translation.main(to_argv({**flags, "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}))
    results = read_results(tmp_path / "out")
    assert (results["train_samples"], results["eval_samples"], results["predict_samples"]) == (40, 8, 5)


def test_a_pretrained_model_with_a_prefix_goes_on_and_can_be_evaluated_alone(run_translation, data, tmp_path):
    flags = {**TINY, **data, "cache_dir": tmp_path / "cache", "max_steps": 3, "save_strategy": "no"}
    run_translation.main(to_argv({**flags, "do_train": True, "output_dir": tmp_path / "a"}))
    for name in ("config_overrides", "max_steps", "vocab_size"):
        del flags[name]
    flags |= {"model_name_or_path": tmp_path / "a", "source_prefix": "de: ", "do_eval": True}
    run_translation.main(to_argv({**flags, "do_train": True, "num_train_epochs": 1, "output_dir": tmp_path / "b"}))
    before = load_file(tmp_path / "a" / "model.safetensors")
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert before["model.shared.weight"].shape == after["model.shared.weight"].shape
    assert not torch.equal(before["model.shared.weight"], after["model.shared.weight"])
    flags |= {"model_name_or_path": tmp_path / "b", "output_dir": tmp_path / "c"}
    run_translation.main(to_argv(flags))
    assert read_results(tmp_path / "c")["eval_loss"] == pytest.approx(read_results(tmp_path / "b")["eval_loss"])


def test_a_multilingual_tokenizer_is_told_its_languages(run_translation, data, tmp_path, capsys, monkeypatch):
    tokenizer = NllbTokenizer()
    tokenizer.save_pretrained(tmp_path / "nllb")
    flags = {**TINY, **data, "do_train": True, "do_predict": True, "max_steps": 1, "save_strategy": "no"}
    flags |= {"tokenizer_name": tmp_path / "nllb", "source_lang": "deu_Latn", "output_dir": tmp_path / "out"}
    for language in (None, "xx"):
        refuse(run_translation, to_argv({**flags, "target_lang": language}), ["--target_lang"], capsys, monkeypatch)
    run_translation.main(to_argv({**flags, "target_lang": "eng_Latn", "cache_dir": tmp_path / "cache"}))
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["forced_bos_token_id"] == tokenizer.convert_tokens_to_ids("eng_Latn")
    (train_file, *_) = sorted((tmp_path / "cache" / "hf_v0init").iterdir(), key=lambda p: -p.stat().st_size)
    row = datasets.Dataset.from_file(str(train_file))[0]
    assert row["input_ids"][0] == tokenizer.convert_tokens_to_ids("deu_Latn")
    assert row["labels"][0] == tokenizer.convert_tokens_to_ids("eng_Latn")


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("bart", TINY["config_overrides"] + ",encoder_attention_heads=2,decoder_attention_heads=2"),
        ("t5", "d_model=16,d_kv=8,d_ff=16,num_layers=1,num_decoder_layers=1,num_heads=2"),
    ],
)
def test_other_architectures_from_scratch(run_translation, data, tmp_path, model_type, overrides):
    flags = {**TINY, **data, "do_train": True, "do_eval": True, "max_steps": 2, "save_strategy": "no"}
    flags |= {"predict_with_generate": True, "model_type": model_type, "config_overrides": overrides}
    run_translation.main(to_argv({**flags, "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model_type
    assert read_results(tmp_path / "out")["eval_loss"] < 12


def test_a_full_output_folder_is_left_alone(run_translation, data, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    flags = {**TINY, **data, "do_train": True, "max_steps": 2, "output_dir": tmp_path / "out"}
    refuse(run_translation, to_argv(flags), ["--overwrite_output_dir"], capsys, monkeypatch)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_old_checkpoints_go_only_when_the_new_run_begins(run_translation, data, tmp_path, capsys, monkeypatch):
    old = tmp_path / "out" / "checkpoint-77"
    old.mkdir(parents=True)
    flags = {**TINY, **data, "do_train": True, "max_steps": 2, "save_steps": 2, "v0_init": "random"}
    flags |= {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache", "overwrite_output_dir": True}
    refuse(run_translation, to_argv({**flags, "optim": "sgd"}), [], capsys, monkeypatch)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-77"]
    run_translation.main(to_argv(flags))
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
def test_as_a_command_stderr_holds_the_line_and_no_traceback(tmp_path):
    command = [SCRIPT, "--do_train", "--output_dir", tmp_path / "out", "--train_file", "x"]
    ended = start(*command, HF_HUB_OFFLINE="1")
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("error: x: no such file")
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_push_sends_model_tokenizer_card_and_v0(data, tmp_path):
    flags = {
        **TINY, **data, "do_train": True, "do_eval": True, "max_steps": 3, "save_strategy": "no", "v0_init": "random",
        "v0_decay": "beta2", "predict_with_generate": True, "source_lang": "de", "target_lang": "en", "output_dir": tmp_path / "out",
        "cache_dir": tmp_path / "cache", "push_to_hub": True, "hub_model_id": "someone/words",
    }  # fmt: skip
    with LoopbackHub() as hub:
        environment = hub.make_environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        start(SCRIPT, *to_argv(flags), **environment).check_returncode()
        files = hub.repositories["someone/words"].head.files
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "v0_init.json"} <= set(
        files
    )
    card = RepoCard(files["README.md"].decode())
    assert {"hf_v0init", "arxiv:2412.02153"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "translation"
    assert {"bleu", "chrf"} <= set(card.data.metrics)
    assert card.data.language == ["de", "en"]


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(data, tmp_path):
    """Twice half the batch: the same loss curve, the same predictions file, v0 from the same samples."""
    flags = {
        **TINY, **data, "do_train": True, "do_eval": True, "do_predict": True, "max_steps": 12, "save_strategy": "no",
        "cache_dir": tmp_path / "cache", "v0_init": "data_driven",
        "learning_rate": 3e-3, "predict_with_generate": True, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    results = {}
    for num_processes, launcher in ((1, []), (2, TORCHRUN)):
        out = tmp_path / str(num_processes)
        own = {"output_dir": out, "per_device_train_batch_size": 16 // num_processes}
        start(*launcher, SCRIPT, *to_argv({**flags, **own})).check_returncode()
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        results[num_processes] = read_results(out), [entry["loss"] for entry in history if "loss" in entry]
        assert len((out / "generated_predictions.txt").read_text().splitlines()) == 21
    (one, losses_one), (two, losses_two) = results[1], results[2]
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], rel=1e-3)
    assert losses_one == pytest.approx(losses_two, rel=2e-3)
