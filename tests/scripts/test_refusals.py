"""Wrong flags and wrong data, by kinds: exit status 2 and one line that names the value, before any token is made, and not a file touched."""

import gzip
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from conftest import make_gpt2
from image_sets import write_image, write_image_folder
from processes import ROOT, start
from script_runs import load_script, quiet_logging, refuse  # noqa: F401
from transformers import NllbTokenizer, ViTConfig, ViTForImageClassification

from hf_v0init.cli.scripts import SCRIPTS
from hf_v0init.tasks.tokenizer_training import train_bpe_tokenizer

GERMAN, ENGLISH = "ein haus\nzwei katzen\ndrei hunde\n", "a house\ntwo cats\nthree dogs\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    texts = {
        "a.de": GERMAN,
        "a.en": ENGLISH,
        "short.en": "a house\n",
        "empty.txt": "",
        "null.jsonl": '{"source": "a", "target": "b"}\n{"source": "a", "target": null}\n',
        "columns.jsonl": '{"x": "a"}\n',
        "long_row.csv": "source,target\na,b\nc,d,e\n",
        "semicolons.csv": "source;target\na;b\n",
        "not_json.jsonl": '{"source": "a", "target": "b"}\n{"source": "a"\n',
        "list.json": "[1, 2]",
        "all_empty.txt": "a\t\n \tb\n",
        "nan.yaml": "learning_rate: .nan\n",
        "twice_spelt.yaml": "learning_rate: 1.0e-3\nlearning-rate: 1.0e-3\n",
        "a_file": "not a folder",
        "empty_folder/x": "",
        "prompts.jsonl": '{"q": "a", "a": "b"}\n{"q": "a", "a": null}\n',
        "numbers.jsonl": '{"x": 1}\n{"x": 2}\n',
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (folder / "utf16.de").write_text(GERMAN, encoding="utf-16")
    (folder / "cut.de.gz").write_bytes(gzip.compress(GERMAN.encode() * 200)[:60])
    write_image_folder(folder / "images", per_class=6)
    write_image_folder(folder / "rgba", per_class=6, channels=4)
    for name, sizes, colors in (
        ("one_class", {"a": 8}, 0), ("two_sizes", {"a": 8, "b": 16}, 0), ("two_modes", {"a": 8, "b": 8}, 3), ("odd", {"a": 28, "b": 28}, 0),
        ("oblong", {"a": (8, 16), "b": (8, 16)}, 0), ("cut_image", {"a": 8, "b": 8}, 0),
    ):  # fmt: skip
        for label, size in sizes.items():
            shape = size if isinstance(size, tuple) else (size, size)
            for number in range(9):
                color = (colors,) if label == "b" and colors else ()
                write_image(folder / name / label / f"{number}.png", np.full(shape + color, 9 * number, np.uint8))
    cut = folder / "cut_image" / "b" / "0.png"
    cut.write_bytes(cut.read_bytes()[:40])
    make_gpt2().save_pretrained(folder / "causal")
    train_bpe_tokenizer(["the cat sat"], 270, for_translation=False).save_pretrained(folder / "causal")
    NllbTokenizer().save_pretrained(folder / "nllb")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 8,
    }
    labels = {"id2label": {0: "dog", 1: "eel"}, "label2id": {"dog": 0, "eel": 1}}
    ViTForImageClassification(ViTConfig(**sizes, **labels, patch_size=4, num_channels=1)).save_pretrained(
        folder / "vit"
    )
    return folder


PARALLEL = "--train_source_file {0}/a.de --train_target_file {0}/a.en"
GPT2 = "--model_type gpt2 --train_file {0}/a.de"

# Flags of the Trainer that every script shares; the line must name the first.
SHARED = """
--learning_rate -1e-3
--learning_rate nan
--learning_rate fast
--per_device_train_batch_size 0
--per_device_train_batch_size 2.5
--gradient_accumulation_steps 0
--num_train_epochs 0
--max_steps 0
--max_steps -5
--warmup_steps -1
--warmup_steps 2.5
--logging_steps -1
--save_steps 0
--save_total_limit 0
--adam_beta1 1.0
--adam_beta2 nan
--adam_epsilon -1e-8
--weight_decay -0.1
--max_grad_norm -1
--label_smoothing_factor 1
--seed -1
--seed 4294967296
--dataloader_num_workers -1
--lr_scheduler_type linaer
--lr_scheduler_kwargs {"cycles":2}
--optim adamm
--optim_args beta9
--cache_dir {0}/a_file/cache
--output_dir {0}/a_file
--report_to nowhere
--report_to trackio
--resume_from_checkpoint {0}/nosuch
--resume_from_checkpoint true
--v0_init newton
--v0_scale -3
--v0_inti random
""".strip().splitlines()

# (script, what is given beside the usual flags, words of the line)
OWN = [
    # a metric that will not be there
    ("translate", "--metric_for_best_model bleu", ["bleu", "gives loss"]),
    ("clm", "--metric_for_best_model perplexty", ["perplexty", "perplexity"]),
    # nothing to do
    ("clm", "-do_train", ["--do_train", "--do_eval"]),
    ("clm", "-do_train --do_eval --validation_file {0}/a.de", ["--model_name_or_path"]),
    ("dcgan", "-do_train", ["nothing to do"]),
    # configurations
    ("translate", "--config_overrides d_model=big", ["d_model=big"]),
    ("translate", "--config_overrides d_modell=16", ["d_modell"]),
    ("translate", "--config_overrides d_model", ["d_model"]),
    ("translate", "--config_overrides d_model=30", ["30"]),
    ("clm", "--config_overrides n_embd=10,n_head=3", ["10", "3"]),
    ("clm", "--config_overrides vocab_size=50 --vocab_size 262", ["vocab_size=50", "262"]),
    ("clm", "--model_type gtp2", ["--model_type=gtp2", "did you mean gpt2?"]),
    ("clm", "--model_type t5", ["t5", "causal"]),
    ("translate", "--model_type gpt2", ["gpt2"]),
    ("translate", "--model_type bart --config_name post_norm", ["--config_name", "--model_type"]),
    ("mlm", "--model_type gpt2", ["gpt2", "masked", "clm"]),
    ("mlm", "--model_type bart", ["bart", "masked"]),
    ("clm", "-model_type", ["--model_name_or_path", "--model_type"]),
    # names and folders
    ("translate", "--model_name_or_path ./nosuch", ["./nosuch"]),
    ("translate", "--tokenizer_name {0}/empty_folder", ["empty_folder"]),
    ("clm", "--model_name_or_path gpt2", ["--model_name_or_path", "--model_type"]),
    ("clm", "-model_type --model_name_or_path {0}/empty_folder", ["empty_folder"]),
    ("clm", "-model_type --model_name_or_path a|b", ["a|b"]),
    ("clm", "--output_dir {0}/empty_folder", ["not empty", "--overwrite_output_dir"]),
    ("mlm", "--tokenizer_name {0}/causal", ["mask token", "--tokenizer_name"]),
    ("mlm", "-model_type --model_name_or_path {0}/causal", ["gpt2", "masked", "clm"]),
    ("translate", "--tokenizer_name {0}/nllb --source_lang deu_Latn", ["--target_lang"]),
    ("translate", "--tokenizer_name {0}/nllb --source_lang deu_Latn --target_lang xx", ["--target_lang"]),
    ("images", "-train -do_train -model_type --model_name_or_path {0}/vit --do_eval --validation_dir {0}/images", ["'ant'", "none that the model knows"]),
    # flags that have no effect, or exclude each other
    ("translate", "--num_beams 0", ["--num_beams=0"]),
    ("translate", "--length_penalty 2", ["--length_penalty=2.0", "--num_beams"]),
    ("translate", "--num_return_sequences 3", ["--num_return_sequences=3", "--num_beams 3"]),
    ("translate", "--sacrebleu_tokenize moses", ["moses", "13a"]),
    ("translate", "--batch_eval_metrics", ["--batch_eval_metrics"]),
    ("clm", "--streaming", ["--streaming", "--max_steps"]),
    ("clm", "--shuffle_buffer_size 5", ["--shuffle_buffer_size=5", "--streaming"]),
    ("translate", "--max_source_length 5000", ["--max_source_length=5000", "1024"]),
    ("clm", "--block_size 2000", ["2000", "1024"]),
    ("clm", "--block_size 2", ["--block_size=2", "3 or more"]),
    ("mlm", "--block_size 2", ["--block_size=2", "3"]),
    ("mlm", "--model_type roberta --block_size 16 --config_overrides max_position_embeddings=16", ["--block_size=16", "take 15 tokens"]),
    ("mlm", "--mlm_probability 0", ["--mlm_probability=0"]),
    ("clm", "--streaming --max_steps 5 --max_tokens_per_batch 64", ["--max_tokens_per_batch", "--streaming"]),
    ("clm", "--prompt_column q", ["--prompt_column", "--completion_column"]),
    ("clm", "--vary_block_size", ["--vary_block_size", "awd_lstm"]),
    ("clm", "--model_type awd_lstm --streaming --max_steps 2", ["--streaming", "awd_lstm", "leave it out"]),
    ("clm", "--model_type awd_lstm --label_smoothing_factor 0.1", ["--label_smoothing_factor=0.1", "leave it out"]),
    ("clm", "--model_type awd_lstm --max_tokens_per_batch 64", ["--max_tokens_per_batch=64", "awd_lstm", "leave it out"]),
    ("clm", "--model_type awd_lstm --prompt_column q --completion_column a", ["--prompt_column=q", "awd_lstm", "leave it out"]),
    ("translate", "--vocab_size 0", ["--vocab_size=0"]),
    ("clm", "--tokenizer_kind word --vocab_size 4", ["vocabulary of 4", "--vocab_size"]),
    ("translate", "--average_checkpoints 3 --save_total_limit 2", ["=3", "--save_total_limit"]),
    ("clm", "--average_checkpoints 3 --save_strategy no", ["=3", "--save_strategy"]),
    ("clm", "--average_checkpoints 3 --eval_strategy steps --load_best_model_at_end", ["=3", "--load_best_model_at_end"]),
    ("translate", "--v0_init random --optim sgd", ["SGD"]),
    ("images", "--lr_decay_factor 0.5", ["--lr_decay_factor=0.5", "--lr_decay_epochs"]),
    ("images", "--lr_decay_epochs 3 --lr_decay_factor 1.5", ["--lr_decay_factor=1.5"]),
    ("images", "--lr_decay_epochs 3 2", ["--lr_decay_epochs", "increasing"]),
    ("images", "--crop_padding 2", ["--crop_padding=2", "--random_crop=pad"]),
    ("images", "--crop_fraction 0", ["--crop_fraction=0", "above 0"]),
    ("images", "--max_tokens_per_batch 64", ["--max_tokens_per_batch"]),
    ("clm", "--early_stopping_patience 2", ["--early_stopping_patience=2", "--eval_strategy"]),
    ("clm", "--early_stopping_patience 2 --do_eval --eval_strategy epoch --validation_file {0}/a.de", ["=2", "--load_best_model_at_end"]),
    ("clm", "--early_stopping_patience 0", ["--early_stopping_patience=0", "1 or more"]),
    ("dcgan", "--v0_optimizer torch.optim:SGD --v0_init random --v0_decay beta2", ["no second moment"]),
    ("dcgan", "--optim schedule_free_adamw", ["AdamWScheduleFree", "two sets of weights"]),
    ("clm", "--lr_scheduler_type constant --warmup_steps 5", ["--warmup_steps=5", "constant_with_warmup"]),
    ("dcgan", "--untuned_warmup linear --warmup_steps 5", ["two warmups"]),
    ("dcgan", "--untuned_warmup trust_radius", ["--untuned_warmup=trust_radius", "a GAN has two"]),
    ("dcgan", "--v0_init random --warmup_steps 5", ["v0_init=random", "warmup_steps=5", "two warmups"]),
    ("dcgan", "--per_device_train_batch_size 19", ["18 training images are too few"]),
    ("dcgan", "--gradient_accumulation_steps 4", ["--gradient_accumulation_steps=4", "no effect"]),
    ("dcgan", "--fp16", ["--fp16=True", "no effect"]),
    ("dcgan", "--image_size 30", ["image_size=30", "8, 16, 32, 64, 128"]),
    # what would end in a traceback
    ("clm", "--save_strategy best", ["--save_strategy=best", "--metric_for_best_model"]),
    ("clm", "--save_strategy best --metric_for_best_model loss", ["--save_strategy=best", "--eval_strategy"]),
    ("clm", "--fsdp full_shard", ["--fsdp"]),
    ("clm", "--deepspeed {0}/list.json", ["list.json"]),
    ("dcgan", "--do_predict", ["--do_predict=True"]),
    ("dcgan", "--save_strategy best --metric_for_best_model loss", ["--save_strategy=best"]),
    ("clm", "--lr_scheduler_kwargs {bad", ["line 1 column 2"]),
    # files of flags
    ("translate", "{0}/twice_spelt.yaml", ["'learning_rate' is given twice"]),
    ("translate", "{0}/nan.yaml", ["--learning_rate=nan"]),
    ("translate", "{0}/a.de", ["a.de"]),
    # texts
    ("translate", "-train", ["no data"]),
    ("clm", "-train", ["--dataset_name", "--train_file"]),
    ("clm", "-train --validation_file {0}/a.de", ["--train_file"]),
    ("translate", "--dataset_name nobody/nothing", ["--dataset_name"]),
    ("clm", "-train --dataset_name {0}/nowhere", ["nowhere"]),
    ("translate", "-train --train_file {0}/null.jsonl", ["None"]),
    ("translate", "-train --train_file {0}/columns.jsonl", ["'source'", "'x'"]),
    ("translate", "-train --train_file {0}/long_row.csv", ["long_row.csv", "line 3"]),
    ("translate", "-train --train_file {0}/semicolons.csv", ["source;target"]),
    ("translate", "-train --train_file {0}/not_json.jsonl", ["not_json.jsonl"]),
    ("translate", "-train --train_file {0}/list.json", ["'source'"]),
    ("translate", "-train --train_file {0}/a.de", ["a.de", "<TAB>"]),
    ("translate", "-train --train_file {0}/all_empty.txt", ["empty side"]),
    ("translate", "-train --train_file {0}/empty_folder", ["empty_folder"]),
    ("translate", "-train --train_source_file {0}/a.de", ["--train_target_file"]),
    ("translate", "--do_predict --test_target_file {0}/a.en", ["--test_source_file"]),
    ("translate", "--train_file {0}/null.jsonl", ["--train_file", "--train_source_file", "not both"]),
    ("translate", "-train --train_source_file {0}/a.de --train_target_file {0}/short.en", ["3 lines", "has 1"]),
    ("translate", "-train --train_source_file {0}/utf16.de --train_target_file {0}/a.en", ["utf16.de", "utf-8"]),
    ("translate", "-train --train_source_file {0}/cut.de.gz --train_target_file {0}/a.en", ["cut.de.gz"]),
    ("translate", "--do_eval", ["no validation data"]),
    ("clm", "--train_file {0}/empty.txt", ["empty.txt", "empty"]),
    ("clm", "--train_file {0}/empty.txt --streaming --max_steps 2", ["empty.txt", "empty"]),
    ("clm", "--train_file {0}/missing.txt", ["missing.txt", "no such file"]),
    ("clm", "--train_file {0}/numbers.jsonl", ["x", "text"]),
    ("clm", "--train_file {0}/prompts.jsonl --text_column text", ["text", "q, a"]),
    ("clm", "--train_file {0}/prompts.jsonl --prompt_column query --completion_column a", ["query", "q, a"]),
    ("clm", "--train_file {0}/prompts.jsonl --prompt_column q --completion_column a", ["'a'", "None"]),
    ("clm", "--do_eval --streaming --max_steps 2", ["validation", "--validation_file"]),
    ("clm", "--do_eval --validation_split_percentage 0.1", ["3 training rows", "0 cannot"]),
    ("clm", "--do_eval --validation_split_rows 3", ["3 training rows", "3 cannot"]),
    ("clm", "--do_eval --validation_split_rows 3 --streaming --max_steps 2", ["--validation_split_rows=3", "no more rows"]),
    # images
    ("images", "-train", ["no data", "--train_dir"]),
    ("images", "-train --do_eval --validation_dir {0}/images", ["no train data", "--train_dir"]),
    ("images", "--train_dir {0}/nowhere", ["nowhere", "no such folder"]),
    ("images", "--train_dir {0}/one_class", ["one class only"]),
    ("images", "--train_dir {0}/cut_image", ["b/0.png", "cannot be read"]),
    ("images", "--train_dir {0}/two_sizes", ["16x16", "--image_size"]),
    ("images", "--train_dir {0}/two_modes", ["RGB", "--image_mode"]),
    ("images", "--train_dir {0}/rgba", ["RGBA", "--image_mode"]),
    ("images", "--train_dir {0}/images/ant", ["has no images"]),
    ("images", "--do_eval --validation_split_percentage 5", ["--validation_split_percentage=5"]),
    ("images", "--do_eval", ["no validation data", "--validation_split_percentage"]),
    ("images", "--do_eval --validation_split_percentage 100", ["--validation_split_percentage=100"]),
    ("images", "--do_eval --validation_dir {0}/two_sizes", ["'a'", "validation data"]),
    ("dcgan", "--train_dir {0}/nowhere", ["no such folder"]),
    ("dcgan", "--train_dir {0}/empty_folder", ["has no images"]),
    ("dcgan", "--train_dir {0}/one_class --do_eval --feature_extractor classifier", ["two classes or more"]),
    ("dcgan", "--train_dir {0}/cut_image", ["b/0.png", "cannot be read as an image"]),
    ("dcgan", "--train_dir {0}/two_sizes", ["is 16x16", "8x8", "--image_size"]),
    ("dcgan", "--train_dir {0}/odd", ["image_size=28", "8, 16, 32, 64, 128"]),
    ("dcgan", "--train_dir {0}/oblong", ["16x8", "--image_size"]),
]  # fmt: skip


USUAL = {
    "translate": f"--do_train {PARALLEL}",
    "clm": f"--do_train {GPT2}",
    "mlm": "--do_train --model_type bert --train_file {0}/a.de",
    "images": "--do_train --model_type vit --train_dir {0}/images",
    "dcgan": "--do_train --train_dir {0}/images --per_device_train_batch_size 4",
}


def compose_argv(script: str, given: str, folder: Path) -> list[str]:
    """The usual flags, but for those that are given and those that begin as a word with one hyphen does; then what is given."""
    words = given.split()
    file = [words.pop(0)] if words and not words[0].startswith("-") else []
    dropped = [f"-{words.pop(0)}" for word in list(words) if word[:1] == "-" and word[:2] != "--" and word == words[0]]
    flags = f"{USUAL[script]} --use_cpu --report_to none --output_dir {{0}}/out".replace("--", "\n--").splitlines()[1:]
    usual = [flag for flag in flags if flag.split()[0] not in words and not flag.startswith(tuple(dropped))]
    return [word.replace("{0}", str(folder)) for word in [*file, *" ".join(usual).split(), *words]]


def read_all(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse_before_tokenizing(script: str, given: str, inputs: Path, capsys, monkeypatch) -> str:
    """The one line with which the script ends, before a token is made and without a file touched."""
    module = load_script(script)
    before = read_all(inputs)

    def must_not_be_called(*args, **kwargs):
        raise AssertionError("tokenizing has begun")

    for name in ("tokenize_pairs", "tokenize_texts", "tokenize_completions"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, must_not_be_called)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = refuse(module, compose_argv(script, given, inputs), [], capsys, monkeypatch)
    assert read_all(inputs) == before and not (inputs / "out").exists()
    return line


@pytest.mark.parametrize("given", SHARED)
def test_flags_that_all_scripts_share(inputs, capsys, monkeypatch, given):
    script = ("translate", "clm", "images")[SHARED.index(given) % 3]  # one of the scripts each, in turn
    if "label_smoothing" in given:
        script = "translate"
    line = refuse_before_tokenizing(script, given, inputs, capsys, monkeypatch)
    name, value = given.removeprefix("--").split()
    assert name in line or value.rpartition("/")[2] in line, line


@pytest.mark.parametrize(("script", "given", "words"), OWN, ids=[f"{case[0]} {case[1]}" for case in OWN])
def test_flags_and_data_of_one_script(inputs, capsys, monkeypatch, script, given, words):
    line = refuse_before_tokenizing(script, given, inputs, capsys, monkeypatch)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "script", ["clm", *(pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS if name != "clm")]
)
def test_the_command_ends_with_status_2_and_one_line(inputs, script):
    flag = "--train_dir" if script in ("images", "dcgan") else "--train_file"
    argv = compose_argv(script, f"-train {flag} {{0}}/nowhere", inputs)
    done = start(ROOT / "scripts" / f"{SCRIPTS[script].file}.py", *argv, HF_HUB_OFFLINE="1")
    # what third-party packages say while they are imported is not the script's to suppress
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and "nowhere" in done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr and not (inputs / "out").exists()
