"""What the scripts measure and keep is what it says: scores, losses, speeds, cards, and runs that are over."""

import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics import CHRF
from script_runs import load_script, quiet_logging, to_argv  # noqa: F401
from test_run_translation import TINY
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.trainer_utils import EvalPrediction

from hf_v0init.tasks import run as run_of_tasks
from hf_v0init.tasks.script_support import NothingToDoError, run_script
from hf_v0init.tasks.translation.metrics import TranslationMetrics, make_bleu

LONG = [f"the {a} dog runs over the {b} field and barks at every bird that he can see" for a in "abcd" for b in "wxyz"]


@pytest.fixture(scope="module")
def run_translation():
    return load_script("translate")


@pytest.fixture(scope="module")
def run_clm():
    return load_script("clm")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("data")
    flags = {}
    for role, lines in (("train", LONG * 4), ("validation", LONG), ("test", LONG[::-1])):
        for side in ("source", "target"):
            path = folder / f"{role}.{side}"
            path.write_text("".join(f"{line}\n" for line in lines))
            flags[f"{role}_{side}_file"] = str(path)
    return flags


@pytest.fixture(scope="module")
def trained(run_translation, data, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run with a v0 that was evaluated and has translated, and its flags."""
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = {
        **TINY, **data, "output_dir": out, "cache_dir": out.parent / "cache", "do_train": True, "do_eval": True, "do_predict": True,
        "max_steps": 4, "save_steps": 2, "v0_init": "data_driven", "v0_decay": "beta2", "predict_with_generate": True,
        "val_max_target_length": 6, "source_lang": "de", "target_lang": "en",
    }  # fmt: skip
    run_translation.main(to_argv(flags))
    return out, flags


def read(path) -> dict:
    return json.loads(Path(path).read_text())


def list_files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


# ---- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_against_the_whole_references(trained, data):
    """The references have some 16 words; the model may say 6 tokens, and eval_loss is over as many."""
    out, _ = trained
    translations = (out / "generated_predictions.txt").read_text().splitlines()
    references = Path(data["test_target_file"]).read_text().splitlines()
    results = read(out / "all_results.json")
    assert results["predict_bleu"] == pytest.approx(sacrebleu.corpus_bleu(translations, [references]).score)
    assert results["predict_chrf"] == pytest.approx(sacrebleu.corpus_chrf(translations, [references]).score)


def make_metrics(tokenizer, texts, **options) -> TranslationMetrics:
    return TranslationMetrics(tokenizer, texts, np.arange(len(texts)), make_bleu(None, False), CHRF(), **options)


def test_a_model_that_says_the_first_words_of_each_reference_is_not_perfect(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    cut = tokenizer(text_target=LONG, max_length=12, truncation=True, padding=True, return_tensors="np")["input_ids"]
    metrics = make_metrics(tokenizer, LONG)
    texts = tokenizer.batch_decode(cut, skip_special_tokens=True)
    expected = sacrebleu.corpus_bleu(texts, [LONG]).score
    assert metrics(EvalPrediction(predictions=cut, label_ids=cut))["bleu"] == pytest.approx(expected)
    assert expected < 70


def test_translations_meet_their_own_references_though_batches_are_sorted_by_length(
    run_translation, data, tmp_path, trained
):
    """Evaluation goes from the longest source to the shortest; a wrong order would pair each with another's reference."""
    out, _ = trained
    lines = [" ".join(line.split()[: 3 + number % 12]) for number, line in enumerate(LONG)]
    for side in ("source", "target"):
        (tmp_path / side).write_text("".join(f"{line}\n" for line in lines))
    heard = {}

    class Listening(TranslationMetrics):
        def __call__(self, evaluation):
            labels = np.where(evaluation.label_ids < 0, 0, evaluation.label_ids)
            heard["labels"] = [best for (best,) in self.decode(labels)]
            heard["references"] = self.references
            return super().__call__(evaluation)

    module = run_translation
    before, module.TranslationMetrics = module.TranslationMetrics, Listening
    try:
        module.main(to_argv({
            "model_name_or_path": out, "output_dir": tmp_path / "new", "cache_dir": tmp_path / "cache", "do_eval": True,
            "validation_source_file": tmp_path / "source", "validation_target_file": tmp_path / "target", "use_cpu": True,
            "predict_with_generate": True, "report_to": "none", "log_level": "error", "per_device_eval_batch_size": 3,
        }))  # fmt: skip
    finally:
        module.TranslationMetrics = before
    assert heard["references"] == lines
    assert [text.strip() for text in heard["labels"]] == lines


def test_gen_len_counts_the_tokens_of_the_best_translation(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    rows = np.array([[pad, 7, 8, end, end, pad, 9, end], [pad, 7, 8, -100, pad, 8, 9, 9]])  # two translations in a row
    metrics = make_metrics(tokenizer, ["a", "b"], num_best=2)
    assert metrics(EvalPrediction(predictions=rows, label_ids=None))["gen_len"] == (3 + 2) / 2
    assert [len(texts) for texts in metrics.decode(rows)] == [2, 2]


# ---- cards and runs that are over ----------------------------------------------------------------------------------------


def test_evaluation_in_the_models_own_folder_keeps_its_card(run_translation, data, trained, tmp_path):
    out, flags = trained
    card = (out / "README.md").read_text()
    assert "--v0_init data_driven" in card and "## Results" in card and "| validation | loss |" in card
    kept = {"model_name_or_path": out, "output_dir": out, "do_eval": True}
    kept |= {
        name: flags[name] for name in (*data, "cache_dir", "use_cpu", "report_to", "log_level") if "train" not in name
    }
    before = list_files(out)
    run_translation.main(to_argv({**kept, "max_eval_samples": 3, "val_max_target_length": 16}))
    again = (out / "README.md").read_text()
    results = read(out / "eval_results.json")
    assert results["eval_samples"] == 3
    assert f"| validation | loss | {results['eval_loss']:.4f} |" in again

    def without_results(text: str) -> str:
        text = re.sub(r"<!-- hf_v0init results: begin -->.*?<!-- hf_v0init results: end -->", "", text, flags=re.DOTALL)
        return re.sub(r"\nmodel-index:.*?(?=\n[\w-]+:|\n---)", "", text, flags=re.DOTALL)

    assert without_results(again) == without_results(card)
    changed = {name for name, content in list_files(out).items() if before.get(name) != content}
    assert {Path(name).name for name in changed} == {"README.md", "eval_results.json", "all_results.json"}


def test_a_finished_run_started_again_is_left_alone(run_translation, trained, capsys, monkeypatch):
    out, flags = trained
    before = list_files(out)
    monkeypatch.setattr("sys.argv", ["run_translation.py", *to_argv(flags)])
    run_script(run_translation.main)  # and no exit status but 0
    printed = capsys.readouterr().out
    assert f"{out}: finished at step 4; nothing to do" in printed and "--overwrite_output_dir" in printed
    assert list_files(out) == before


def test_without_checkpoints_a_finished_run_is_left_alone_too(run_translation, data, tmp_path):
    flags = {
        **TINY,
        **data,
        "do_train": True,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "output_dir": tmp_path / "out",
    }
    del flags["vocab_size"]
    flags |= {"vocab_size": 290, "cache_dir": tmp_path / "cache"}
    run_translation.main(to_argv(flags))
    before = list_files(tmp_path / "out")
    with pytest.raises(NothingToDoError, match="finished at step 4"):
        run_translation.main(to_argv(flags))
    assert list_files(tmp_path / "out") == before
    # a longer run is another matter, and so is an evaluation that was not made yet
    run_translation.main(to_argv({**flags, "do_eval": True}))
    results = read(tmp_path / "out" / "all_results.json")
    assert results["train_loss"] == read(tmp_path / "out" / "train_results.json")["train_loss"]
    assert "eval_loss" in results
    weights = str(tmp_path / "out" / "model.safetensors")
    assert list_files(tmp_path / "out")[weights] == before[weights]
    assert read(tmp_path / "out" / "trainer_state.json")["global_step"] == 4


def test_the_evaluation_that_was_missing_is_of_the_model_that_was_saved(run_translation, data, tmp_path):
    flags = {**TINY, **data, "do_train": True, "max_steps": 3, "save_steps": 2, "output_dir": tmp_path / "a"}
    flags |= {"cache_dir": tmp_path / "cache", "v0_init": "random", "v0_decay": "beta2"}
    run_translation.main(to_argv({**flags, "do_eval": True}))
    run_translation.main(to_argv({**flags, "output_dir": tmp_path / "b"}))
    run_translation.main(to_argv({**flags, "output_dir": tmp_path / "b", "do_eval": True}))
    losses = [read(tmp_path / name / "all_results.json")["eval_loss"] for name in "ab"]
    assert losses[0] == losses[1]
    assert "--v0_init random" in (tmp_path / "b" / "README.md").read_text()


# ---- losses and speeds ------------------------------------------------------------------------------------------------------


def test_train_loss_after_a_resume_is_of_the_steps_since(run_clm, tmp_path):
    """The Trainer would divide by the steps before it, too. Killed between its last checkpoint and its results, there is none."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{line}\n" for line in LONG * 3))
    flags = {
        "model_type": "gpt2", "config_overrides": "n_embd=16,n_layer=1,n_head=2,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
        "vocab_size": 300, "train_file": text, "block_size": 16, "do_train": True, "max_steps": 6, "save_steps": 2,
        "logging_steps": 1, "use_cpu": True, "report_to": "none", "log_level": "error", "cache_dir": tmp_path / "cache",
        "learning_rate": 1e-2,
    }  # fmt: skip
    run_clm.main(to_argv({**flags, "output_dir": tmp_path / "straight"}))
    history = read(tmp_path / "straight" / "trainer_state.json")["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    for step, expected in ((2, np.mean(losses[2:])), (6, None)):
        out = tmp_path / f"resumed-{step}"
        out.mkdir()
        os.rename(tmp_path / "straight" / f"checkpoint-{step}", out / f"checkpoint-{step}")
        run_clm.main(to_argv({**flags, "output_dir": out}))
        assert read(out / "train_results.json").get("train_loss") == (expected and pytest.approx(expected, rel=1e-5))


def test_log_and_card_speak_of_the_token_budget(run_translation, data, tmp_path, monkeypatch, caplog):
    flags = {**TINY, **data, "do_train": True, "max_steps": 3, "save_strategy": "no", "max_tokens_per_batch": 300}
    flags |= {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache", "log_level": "info"}
    monkeypatch.setattr(run_of_tasks, "start_logging", lambda *_: None)
    with caplog.at_level(logging.INFO):
        run_translation.main(to_argv(flags))
    assert "batches by token budget" in caplog.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- train_batch_size: 300 tokens per batch" in card and "total_train_batch_size" not in card


def test_a_resume_does_not_speak_of_weights_that_are_tied(run_translation, data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(run_of_tasks, "start_logging", lambda *_: None)
    flags = {**TINY, **data, "do_train": True, "max_steps": 2, "save_steps": 1, "output_dir": tmp_path / "out"}
    flags |= {"cache_dir": tmp_path / "cache", "log_level": "warning"}
    run_translation.main(to_argv({**flags, "max_steps": 1}))
    with caplog.at_level(logging.WARNING):
        run_translation.main(to_argv(flags))
    assert "missing keys" not in caplog.text
    assert "it goes on from checkpoint-1" in caplog.text and "--overwrite_output_dir" in caplog.text
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.shared.weight
