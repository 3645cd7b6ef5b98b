"""scripts/run_translation.py from end to end: what it learns, measures, writes, leaves alone, and goes on from."""

import gzip
import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
import yaml
from huggingface_hub import RepoCard
from multilingual_models import make_mbart, make_mbart50, make_nllb
from processes import ROOT, TORCHRUN, start
from safetensors.torch import load_file
from script_runs import (  # noqa: F401
    assert_equal_weights,
    load_script,
    quiet_logging,
    read_results,
    read_state,
    refuse,
    to_argv,
)  # fmt: skip
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_v0init.errors import InputError
from hf_v0init.tasks import run as run_of_tasks
from hf_v0init.tasks.script_support import run_script
from hf_v0init.tasks.translation.pairs import PairCollator
from hf_v0init.tasks.whole_weights import average_checkpoints

SCRIPT = ROOT / "scripts" / "run_translation.py"
run_translation = load_script("translate")
GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LONG = [f"the {a} dog runs over the {b} field and barks at every bird that he can see" for a in "abcd" for b in "wxyz"]

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


@pytest.fixture
def run(tmp_path):
    """Run the script into a folder below `tmp_path`; the folder."""

    def run(flags: dict, name: str = "out", **changes) -> Path:
        flags = {"cache_dir": tmp_path / "cache", "output_dir": tmp_path / name} | flags | changes
        run_translation.main(to_argv(flags))
        return Path(flags["output_dir"])

    return run


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


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict:
    """Flags that name parallel files of 16 long lines, four times for training."""
    folder, flags = tmp_path_factory.mktemp("texts"), {}
    for role, lines in (("train", LONG * 4), ("validation", LONG), ("test", LONG[::-1])):
        for side in ("source", "target"):
            flags[f"{role}_{side}_file"] = path = folder / f"{role}.{side}"
            path.write_text("".join(f"{line}\n" for line in lines))
    return flags


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run with a v0 that was evaluated and has translated, and its flags."""
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = {
        **TINY, **texts, "output_dir": out, "cache_dir": out.parent / "cache", "do_train": True, "do_eval": True, "do_predict": True,
        "max_steps": 4, "save_steps": 2, "v0_init": "data_driven", "v0_decay": "beta2", "predict_with_generate": True,
        "val_max_target_length": 6, "source_lang": "de", "target_lang": "en",
    }  # fmt: skip
    run_translation.main(to_argv(flags))
    return out, flags


def list_files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


# ---- whole runs --------------------------------------------------------------------------------------------------------


def test_trains_translates_averages_and_saves(data, tmp_path):
    flags = {
        **TINY, **data, "do_train": True, "do_eval": True, "do_predict": True, "max_steps": 240, "learning_rate": 5e-3,
        "lr_scheduler_type": "inverse_sqrt", "adam_beta2": 0.98, "v0_init": "data_driven", "v0_decay": "beta2",
        "max_tokens_per_batch": 100, "label_smoothing_factor": 0.1, "save_steps": 40, "save_total_limit": 3,
        "average_checkpoints": 3, "num_beams": 3, "length_penalty": 1.5, "predict_with_generate": True,
        "source_lang": "de", "target_lang": "en", "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache",
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
    made = [model.generate(**tokenizer(source, return_tensors="pt"))[0] for source in sources]
    said = tokenizer.batch_decode(made, skip_special_tokens=True)
    assert sum(map(str.__eq__, said, predictions)) >= 18  # in a batch near ties may fall otherwise

    assert json.loads((out / "v0_init.json").read_text())["strategy"] == "data_driven"
    card = RepoCard((out / "README.md").read_text())
    assert {"hf_v0init", "arxiv:2412.02153"} <= set(card.data.tags) and "train.source.gz" in card.content
    assert card.data.pipeline_tag == "translation" and card.data.language == ["de", "en"]
    assert {"bleu", "chrf"} <= set(card.data.metrics)


def test_resume_is_found_and_equals_a_straight_run(run, data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(run_of_tasks, "start_logging", lambda *_: None)
    flags = {**TINY, **data, "do_train": True, "max_steps": 16, "save_steps": 9, "max_tokens_per_batch": 128}
    flags |= {"v0_init": "random", "log_level": "info"}
    with caplog.at_level(logging.INFO):
        straight = run(flags, "straight")
    assert "batches by token budget" in caplog.text
    card = (straight / "README.md").read_text()
    assert "- train_batch_size: 128 tokens per batch" in card and "total_train_batch_size" not in card
    (tmp_path / "stopped").mkdir()
    (straight / "checkpoint-9").rename(tmp_path / "stopped" / "checkpoint-9")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        stopped = run(flags, "stopped")
    assert "goes on from checkpoint-9" in caplog.text and "missing keys" not in caplog.text  # of tied weights
    assert_equal_weights(straight, stopped)
    history = read_state(stopped)["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 17))
    model = AutoModelForSeq2SeqLM.from_pretrained(stopped)
    assert model.lm_head.weight is model.model.shared.weight


def test_a_data_set_by_name_is_read_by_its_splits(run, tmp_path):
    """A folder stands for the Hub: `datasets` takes both by the same argument."""
    folder = tmp_path / "named"
    folder.mkdir()
    for split, size in (("train", 40), ("validation", 8), ("test", 6)):
        rows = [{"translation": {"de": GERMAN[i % 10], "en": ENGLISH[i % 10]}} for i in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {**TINY, "dataset_name": folder, "source_lang": "de", "target_lang": "en", "max_steps": 2}
    flags |= {"do_train": True, "do_eval": True, "do_predict": True, "max_predict_samples": 5, "save_strategy": "no"}
    results = read_results(run(flags))
    assert (results["train_samples"], results["eval_samples"], results["predict_samples"]) == (40, 8, 5)


def test_a_pretrained_model_with_a_prefix_goes_on_and_can_be_evaluated_alone(run, trained):
    out, flags = trained
    of_new_model = "config_overrides max_steps vocab_size do_train do_predict output_dir v0_init v0_decay".split()
    flags = {name: value for name, value in flags.items() if name not in of_new_model} | {"source_prefix": "de: "}
    further = run(flags, "further", do_train=True, num_train_epochs=1, save_strategy="no", model_name_or_path=out)
    before, after = (load_file(folder / "model.safetensors")["model.shared.weight"] for folder in (out, further))
    assert before.shape == after.shape and not torch.equal(before, after)
    alone = run(flags, "alone", model_name_or_path=further)
    assert read_results(alone)["eval_loss"] == pytest.approx(read_results(further)["eval_loss"])


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("bart", TINY["config_overrides"] + ",encoder_attention_heads=2,decoder_attention_heads=2"),
        ("t5", "d_model=16,d_kv=8,d_ff=16,num_layers=1,num_decoder_layers=1,num_heads=2"),
    ],
)
def test_other_architectures_from_scratch(run, data, model_type, overrides):
    flags = {**TINY, **data, "do_train": True, "do_eval": True, "max_steps": 2, "save_strategy": "no"}
    out = run(flags, predict_with_generate=True, model_type=model_type, config_overrides=overrides)
    assert json.loads((out / "config.json").read_text())["model_type"] == model_type
    assert read_results(out)["eval_loss"] < 12


@pytest.mark.parametrize("make", [make_mbart, make_mbart50, make_nllb])
def test_multilingual_models_are_fine_tuned_and_generate_as_they_were_trained(run, tmp_path, make):
    """With label smoothing, which the Trainer has the loss function see to: the model never gets the labels."""
    torch.manual_seed(0)
    tokenizer, network, (source_lang, target_lang) = make()
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "source").write_text("ein haus\nzwei katzen\n" * 8)
    (tmp_path / "target").write_text("two cats\nhouse two cats\n" * 8)
    out = run({
        **{f"{role}_{side}_file": tmp_path / side for role in ("train", "test") for side in ("source", "target")},
        "model_name_or_path": tmp_path / "model", "do_train": True, "do_predict": True, "max_steps": 100, "use_cpu": True,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 16, "report_to": "none",
        "log_level": "error", "source_lang": source_lang, "target_lang": target_lang, "max_source_length": 16, "max_target_length": 16,
        "save_strategy": "no", "label_smoothing_factor": 0.01,
    })  # fmt: skip
    said = (out / "generated_predictions.txt").read_text().replace(" ", "").splitlines()
    assert said == ["twocats", "housetwocats"] * 8
    assert read_results(out)["predict_loss"] < 0.5
    saved = AutoTokenizer.from_pretrained(out, src_lang=source_lang, tgt_lang=target_lang)
    assert type(saved) is type(tokenizer)
    # generation starts from what the decoder started from in training, and names the language once
    rows = saved(["ein haus", "zwei katzen"], text_target=["two cats", "house two cats"])
    model, language = AutoModelForSeq2SeqLM.from_pretrained(out), saved.convert_tokens_to_ids(target_lang)
    assert all(saved.convert_tokens_to_ids(source_lang) in ids for ids in rows["input_ids"])
    batch = PairCollator(saved, model=model)([{name: values[i] for name, values in rows.items()} for i in range(2)])
    made = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=12)
    assert (made == language).sum(1).tolist() == [1, 1]
    for tokens, given in zip(made.tolist(), batch["decoder_input_ids"].tolist(), strict=True):
        num_words = given.index(saved.eos_token_id, 1) if saved.eos_token_id in given[1:] else len(given)
        assert tokens[:num_words] == given[:num_words]


# ---- translations and their scores -------------------------------------------------------------------------------------


def test_scores_are_against_the_whole_references(trained, texts):
    """The references have some 16 words; the model may say 6 tokens, and eval_loss is over as many."""
    out, _ = trained
    translations = (out / "generated_predictions.txt").read_text().splitlines()
    references = texts["test_target_file"].read_text().splitlines()
    results = read_results(out)
    assert results["predict_bleu"] == pytest.approx(sacrebleu.corpus_bleu(translations, [references]).score)
    assert results["predict_chrf"] == pytest.approx(sacrebleu.corpus_chrf(translations, [references]).score)


@pytest.fixture
def sorted_apart(trained, tmp_path) -> tuple[dict, list[str]]:
    """Flags to translate 16 lines of 2 to 17 words by the trained model, and the lines."""
    lines = [" ".join(line.split()[: 2 + 7 * number % 16]) for number, line in enumerate(LONG)]
    (tmp_path / "source").write_text("".join(f"{line}\n" for line in lines))
    flags = {"model_name_or_path": trained[0], "use_cpu": True, "report_to": "none", "log_level": "error"}
    return flags | {"disable_tqdm": True, "per_device_eval_batch_size": 3, "val_max_target_length": 8}, lines


def test_translations_meet_their_own_references_though_batches_are_sorted_by_length(
    run, sorted_apart, tmp_path, monkeypatch
):
    """Evaluation goes from the longest source to the shortest; a wrong order would pair each with another's reference."""
    flags, lines = sorted_apart
    heard = {}

    class Listening(run_translation.TranslationMetrics):
        def __call__(self, evaluation):
            labels = np.where(evaluation.label_ids < 0, 0, evaluation.label_ids)
            heard["labels"] = [best for (best,) in self.decode(labels)]
            heard["references"] = self.references
            return super().__call__(evaluation)

    monkeypatch.setattr(run_translation, "TranslationMetrics", Listening)
    files = {f"validation_{side}_file": tmp_path / "source" for side in ("source", "target")}
    run({**flags, **files}, do_eval=True, predict_with_generate=True, val_max_target_length=None)
    assert heard["references"] == lines
    assert [text.strip() for text in heard["labels"]] == lines


def test_sources_alone_are_translated_and_the_best_translations_are_written_best_first(run, sorted_apart, tmp_path):
    flags, lines = sorted_apart
    flags = flags | {"do_predict": True, "num_beams": 3}
    (tmp_path / "upper").write_text((tmp_path / "source").read_text().upper())
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"source": line}) + "\n" for line in lines))
    scored = {"test_source_file": tmp_path / "source", "test_target_file": tmp_path / "upper"}
    scored |= {"sacrebleu_tokenize": "char", "sacrebleu_lowercase": True}
    found = {
        name: run(flags | more, name)
        for name, more in {
            "alone": {"test_source_file": tmp_path / "source"},
            "table": {"test_file": tmp_path / "test.jsonl"},
            "beside": scored,
            "three": {**scored, "num_return_sequences": 3},
        }.items()
    }
    said = {name: (out / "generated_predictions.txt").read_text().splitlines() for name, out in found.items()}
    assert len(said["alone"]) == 16 and all(lines == said["alone"] for lines in said.values())
    results = {name: read_results(out) for name, out in found.items()}
    assert results["alone"]["predict_samples"] == 16 and not {"predict_loss", "predict_bleu"} & results["alone"].keys()
    assert not (found["alone"] / "README.md").exists()  # the model and its card are elsewhere
    rows = [json.loads(line) for line in (found["three"] / "generated_nbest.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == lines
    assert all(len(row["translations"]) == 3 and len(set(row["translations"])) > 1 for row in rows)
    assert [" ".join(row["translations"][0].split()) for row in rows] == said["alone"]
    # sacrebleu's flags decide the score, and the best translation alone has one
    references = [(tmp_path / "upper").read_text().splitlines()]
    expected = sacrebleu.corpus_bleu(said["alone"], references, tokenize="char", lowercase=True).score
    for name in ("beside", "three"):
        assert results[name]["predict_bleu"] == pytest.approx(expected)
        assert all(word in results[name]["predict_bleu_signature"] for word in ("case:lc", "tok:char"))
    assert results["beside"]["predict_chrf"] == results["three"]["predict_chrf"]


# ---- folders that are in use -------------------------------------------------------------------------------------------


def test_old_checkpoints_go_only_when_the_new_run_begins(run, data, tmp_path, capsys, monkeypatch):
    old = tmp_path / "out" / "checkpoint-77"
    old.mkdir(parents=True)
    flags = {**TINY, **data, "do_train": True, "max_steps": 2, "save_steps": 2, "v0_init": "random"}
    flags |= {"output_dir": tmp_path / "out", "overwrite_output_dir": True}
    refuse(run_translation, to_argv({**flags, "optim": "sgd"}), [], capsys, monkeypatch)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-77"]
    run(flags)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_evaluation_in_the_models_own_folder_keeps_its_card(run, trained):
    out, flags = trained
    card = (out / "README.md").read_text()
    assert "--v0_init data_driven" in card and "## Results" in card and "| validation | loss |" in card
    kept = {name: flags[name] for name in ("cache_dir", "use_cpu", "report_to", "log_level", "output_dir")}
    kept |= {name: value for name, value in flags.items() if name.startswith("validation_")}
    before = list_files(out)
    run(kept, model_name_or_path=out, do_eval=True, max_eval_samples=3, val_max_target_length=16)
    again, results = (out / "README.md").read_text(), json.loads((out / "eval_results.json").read_text())
    assert results["eval_samples"] == 3
    assert f"| validation | loss | {results['eval_loss']:.4f} |" in again

    def without_results(text: str) -> str:
        text = re.sub(r"<!-- hf_v0init results: begin -->.*?<!-- hf_v0init results: end -->", "", text, flags=re.DOTALL)
        return re.sub(r"\nmodel-index:.*?(?=\n[\w-]+:|\n---)", "", text, flags=re.DOTALL)

    assert without_results(again) == without_results(card)
    changed = {name for name, content in list_files(out).items() if before.get(name) != content}
    assert changed == {"README.md", "eval_results.json", "all_results.json"}


def test_a_finished_run_started_again_is_left_alone(trained, capsys, monkeypatch):
    out, flags = trained
    before = list_files(out)
    monkeypatch.setattr("sys.argv", ["run_translation.py", *to_argv(flags)])
    run_script(run_translation.main)  # and no exit status but 0
    printed = capsys.readouterr().out
    assert f"{out}: finished at step 4; nothing to do" in printed and "--overwrite_output_dir" in printed
    assert list_files(out) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_source_file": "test_source_file"}, "train_source_file has other content"),
        ({"source_lang": "nl"}, "source_lang was de and is now nl"),
        ({"config_overrides": TINY["config_overrides"].replace("32", "48")}, "config_overrides was d_model=32"),
        ({"optim": "rmsprop"}, "is now rmsprop"),
        ({"optim_args": "fused=False"}, "optim_args was None and is now fused=False"),
        ({"vocab_size": 310}, "vocab_size was 300 and is now 310"),
        ({"max_train_samples": 8}, "max_train_samples was None and is now 8"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_another_run_does_not_continue_this_one(trained, monkeypatch, changes, words):
    out, flags = trained
    changes = {name: flags.get(value, value) for name, value in changes.items()}
    monkeypatch.setattr(run_translation.DataArguments, "load_roles", lambda *_: pytest.fail("data is read"))
    before = list_files(out)
    with pytest.raises(InputError, match=words) as caught:
        run_translation.main(to_argv({**flags, "max_steps": 6, **changes}))
    message = str(caught.value)
    assert "\n" not in message and "checkpoint-4" in message and "--overwrite_output_dir" in message
    assert list_files(out) == before


def test_what_may_change_on_the_way_does(trained, monkeypatch, caplog, tmp_path):
    """The learning rate, the batch size and the folder of the data."""
    _, flags = trained
    moved = tmp_path / "elsewhere.de"
    moved.write_bytes(flags["train_source_file"].read_bytes())

    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr(run_of_tasks, "start_logging", lambda *_: None)
    monkeypatch.setattr(run_translation.DataArguments, "load_roles", stop)
    changes = {"train_source_file": moved, "learning_rate": 1e-4, "per_device_train_batch_size": 4, "max_steps": 6}
    with caplog.at_level(logging.WARNING, logger="hf_v0init"), pytest.raises(InterruptedError):
        run_translation.main(to_argv(flags | changes))
    assert "it goes on from checkpoint-4; to start from scratch instead, give --overwrite_output_dir" in caplog.text


# ---- processes of their own --------------------------------------------------------------------------------------------


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
        history = read_state(out)["log_history"]
        results[num_processes] = read_results(out), [entry["loss"] for entry in history if "loss" in entry]
        assert len((out / "generated_predictions.txt").read_text().splitlines()) == 21
    (one, losses_one), (two, losses_two) = results[1], results[2]
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], rel=1e-3)
    assert losses_one == pytest.approx(losses_two, rel=2e-3)
