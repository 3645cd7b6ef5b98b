#!/usr/bin/env python
"""Train a small post-norm Transformer from one seed: without a warmup, with several, and with v0 instead.

It learns German to English on a corpus that comes with the package, so it needs no network. The runs go side by
side, one thread each. At the end: a table, a picture of loss and first updates, and what the numbers say.

    python scripts/demo.py [--output_dir outputs/demo] [--steps 500] [--seed 1]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hf_v0init.errors import InputError
from hf_v0init.method.length import compute_bounds
from hf_v0init.plots import TrainingCurve, draw_training_curves
from hf_v0init.third_party_messages import drop_known_messages

FIGURE_FILE, RESULTS_FILE, TOKENIZER_FOLDER = "loss_and_updates.png", "results.json", "tokenizer"
NO_WARMUP, CUSTOMARY, BEST = "no warmup", "warmup, 10%", "warmup, best tried"
LONG, V0 = "warmup, two thirds", "v0, no warmup"
FOLDERS = {NO_WARMUP: "no_warmup", CUSTOMARY: "customary", BEST: "best", LONG: "long", V0: "v0"}
RUNS_FOR_THE_BEST = 6  # lengths tried: 50, 100, 200, 300, 333 and 400 of 500 steps


@dataclass(frozen=True)
class DemoSettings:
    """What the runs have in common."""

    output_dir: str = "outputs/demo"
    steps: int = 500
    seed: int = 1
    num_pairs: int = 12_000
    num_test: int = 200
    vocab_size: int = 800
    num_layers: int = 6
    d_model: int = 64
    ffn_dim: int = 128
    num_heads: int = 4
    batch_size: int = 64
    learning_rate: float = 3e-3
    beta2: float = 0.98
    customary_fraction: float = 0.1
    best_fraction: float = 0.6
    update_steps: int = 200  # steps over which the size of the updates is measured
    log_every: int = 10
    max_tokens: int = 64  # of a generated translation


@dataclass
class ArmResult:
    """What one run measured: losses in nats per token, BLEU in percent, seconds of wall-clock time."""

    name: str
    validation_loss: float
    bleu: float
    chrf: float
    seconds: float
    num_parameters: int
    loss_steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    update_steps: list[int] = field(default_factory=list)
    update_sizes: list[float] = field(default_factory=list)
    v0_report: dict | None = None
    warmup_steps: int = 0
    bleu_signature: str = ""


def read_settings(argv: list[str]) -> DemoSettings:
    """Read the flags; raise `InputError` if one cannot be used or the output folder cannot be written."""
    defaults = DemoSettings()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="demo.py")
    parser.add_argument("--output_dir", default=defaults.output_dir, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help="optimizer steps per run; default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="of weights and data order; default: %(default)s"
    )
    parser.error = _raise_input_error
    flags = parser.parse_args(argv)
    if flags.steps < 1:
        raise InputError(f"--steps {flags.steps}: must be a whole number >= 1")
    if not 0 <= flags.seed < 2**32:
        raise InputError(f"--seed {flags.seed}: must be from 0 to 2^32 - 1")
    from hf_v0init.tasks.output_folder import require_writable_output

    require_writable_output(flags.output_dir, overwrite=True)
    return DemoSettings(output_dir=flags.output_dir, steps=flags.steps, seed=flags.seed)


def _raise_input_error(message: str) -> None:
    raise InputError(message)


# ------------------------------------------------------------------------------------------------------- one run


def train_arm(name: str, settings: DemoSettings, report_progress) -> ArmResult:
    """Train and evaluate one of the runs; `report_progress(step, loss)` is called after every step."""
    drop_known_messages()
    # Imported here: the process that only shows progress needs none of it.
    import datasets
    import torch
    from sacrebleu.metrics import CHRF
    from transformers import DataCollatorForSeq2Seq, MarianMTModel, PreTrainedTokenizerFast, TrainerCallback, set_seed
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils import logging as transformers_logging

    from hf_v0init import V0InitSeq2SeqTrainer, V0InitSeq2SeqTrainingArguments
    from hf_v0init.tasks.token_loss import ExactEvaluationMixin, TokenCrossEntropy
    from hf_v0init.tasks.translation.embedded_corpus import load_embedded_corpus
    from hf_v0init.tasks.translation.metrics import compute_scores, make_bleu
    from hf_v0init.tasks.translation.post_norm import apply_xavier_initialization, build_post_norm_config

    class DemoTrainer(ExactEvaluationMixin, V0InitSeq2SeqTrainer):
        """Evaluates the loss exactly, per token over the whole set."""

    class MeasureRun(TrainerCallback):
        """Reports progress, and measures by how much the optimizer moves the weights in the first steps."""

        def __init__(self) -> None:
            self.sizes: list[float] = []
            self.before: list = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step < settings.update_steps:
                self.before = [p.detach().clone() for p in model.parameters() if p.requires_grad]

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if self.before:
                after = [p.detach() for p in model.parameters() if p.requires_grad]
                squares = sum(float((a - b).square().sum()) for a, b in zip(after, self.before, strict=True))
                count = sum(a.numel() for a in after)
                self.sizes.append((squares / count) ** 0.5 / args.learning_rate)
                self.before = []

        def on_step_end(self, args, state, control, **kwargs):
            report_progress(state.global_step, None)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                report_progress(state.global_step, logs["loss"])

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    output_dir = Path(settings.output_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output_dir / TOKENIZER_FOLDER)
    corpus = load_embedded_corpus(settings.num_pairs, large=True)
    corpus["test"] = corpus["test"].select(range(min(settings.num_test, len(corpus["test"]))))

    def tokenize(batch: dict) -> dict:
        return tokenizer(batch["source"], text_target=batch["target"])

    tokenized = corpus.map(tokenize, batched=True, remove_columns=corpus["train"].column_names)

    set_seed(settings.seed)
    config = build_post_norm_config(
        len(tokenizer),
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        d_model=settings.d_model,
        ffn_dim=settings.ffn_dim,
        num_heads=settings.num_heads,
        num_layers=settings.num_layers,
        dropout=0.0,
        max_positions=128,
    )
    model = MarianMTModel(config)
    apply_xavier_initialization(model)

    fractions = {CUSTOMARY: settings.customary_fraction, BEST: settings.best_fraction}
    warmup_steps = round(fractions.get(name, 0.0) * settings.steps)
    if name == LONG:
        warmup_steps = compute_bounds(settings.steps)[1]
    arguments = V0InitSeq2SeqTrainingArguments(
        output_dir=str(output_dir / FOLDERS[name]),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        adam_beta2=settings.beta2,
        lr_scheduler_type="linear",
        warmup_steps=warmup_steps,
        v0_init="data_driven" if name == V0 else "zeros",
        max_grad_norm=0.0,
        seed=settings.seed,
        use_cpu=True,
        logging_steps=min(settings.log_every, settings.steps),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        predict_with_generate=True,
        generation_max_length=settings.max_tokens,
        generation_num_beams=1,
    )
    measure = MeasureRun()
    trainer = DemoTrainer(
        model=model,
        args=arguments,
        train_dataset=tokenized["train"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_loss_func=TokenCrossEntropy(),
        callbacks=[measure],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()

    args = trainer.args
    args.predict_with_generate = False
    validation_loss = trainer.evaluate(tokenized["validation"])["eval_loss"]
    args.predict_with_generate = True
    predicted = trainer.predict(tokenized["test"]).predictions
    predicted[predicted < 0] = tokenizer.pad_token_id
    translations = tokenizer.batch_decode(predicted, skip_special_tokens=True)
    references = list(corpus["test"]["target"])
    scores = compute_scores(translations, references, make_bleu(None, lowercase=False), CHRF())

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return ArmResult(
        name=name,
        validation_loss=validation_loss,
        bleu=scores["bleu"],
        chrf=scores["chrf"],
        seconds=time.perf_counter() - started,
        num_parameters=sum(p.numel() for p in model.parameters()),
        loss_steps=[entry["step"] for entry in logged],
        losses=[entry["loss"] for entry in logged],
        update_steps=list(range(1, len(measure.sizes) + 1)),
        update_sizes=measure.sizes,
        v0_report=trainer.get_v0_report(),
        warmup_steps=(trainer.get_v0_report() or {}).get("decay_steps", warmup_steps),
        bleu_signature=scores["bleu_signature"],
    )


def run_arm_process(name: str, settings: DemoSettings, connection: Connection) -> None:
    """Body of a child process: send ("step", step, loss), then ("result", ArmResult) or ("error", traceback)."""
    try:
        result = train_arm(name, settings, lambda step, loss: connection.send(("step", step, loss)))
        connection.send(("result", result))
    except KeyboardInterrupt:
        pass
    except Exception:
        connection.send(("error", traceback.format_exc()))
    finally:
        connection.close()


# ----------------------------------------------------------------------------------------------------- all of them


def train_arms(settings: DemoSettings, console: Console) -> list[ArmResult]:
    """Run the settings in processes of their own and show their progress; results in the order of `FOLDERS`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("spawn")
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    results: dict[str, ArmResult] = {}
    processes: list = []
    with Progress(*columns, console=console) as progress:
        try:
            tasks, connections = {}, {}
            # Ctrl-C is for this process, which ends the others; one that is still importing would answer with a traceback.
            on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
            for name in FOLDERS:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=run_arm_process, args=(name, settings, sender), daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                connections[receiver] = name
                tasks[name] = progress.add_task(name, total=settings.steps, state="loading")
            signal.signal(signal.SIGINT, on_interrupt)
            while connections:
                for receiver in wait(list(connections)):
                    name = connections[receiver]
                    try:
                        kind, *content = receiver.recv()
                    except EOFError:
                        if name not in results:
                            raise RuntimeError(f"the run '{name}' ended without a result (out of memory?)") from None
                        del connections[receiver]
                        continue
                    if kind == "error":
                        raise RuntimeError(f"the run '{name}' failed:\n{content[0]}")
                    if kind == "result":
                        results[name] = content[0]
                        progress.update(tasks[name], state=f"BLEU {content[0].bleu:.1f}")
                        progress.stop_task(tasks[name])
                    else:
                        step, loss = content
                        progress.update(tasks[name], completed=step)
                        if step == settings.steps:
                            progress.update(tasks[name], state="translating the test set")
                        elif loss is not None:
                            progress.update(tasks[name], state=f"loss {loss:.2f}")
        finally:
            for process in processes:
                if process.is_alive() and len(results) < len(FOLDERS):
                    process.terminate()
                process.join()
    return [results[name] for name in FOLDERS]


def describe_outcome(results: list[ArmResult], settings: DemoSettings) -> str:
    """One sentence on what these numbers say, from the numbers alone."""
    bleu = {result.name: result.bleu for result in results}
    length = {result.name: result.warmup_steps for result in results}
    return (
        f"In this one run of seed {settings.seed} with {settings.steps:,} steps, v0 in place of the warmup, over {length[V0]} steps with "
        f"nothing tuned, reached {bleu[V0]:.1f} BLEU: {_compare(bleu[V0], bleu[NO_WARMUP])} no warmup ({bleu[NO_WARMUP]:.1f}), "
        f"{_compare(bleu[V0], bleu[CUSTOMARY])} the customary {length[CUSTOMARY]} steps of warmup ({bleu[CUSTOMARY]:.1f}), "
        f"{_compare(bleu[V0], bleu[BEST])} the best of {RUNS_FOR_THE_BEST} lengths tried, {length[BEST]} steps ({bleu[BEST]:.1f}), and "
        f"{_compare(bleu[V0], bleu[LONG])} one of {length[LONG]} steps ({bleu[LONG]:.1f})."
    )


def _compare(score: float, other: float) -> str:
    difference = score - other
    if abs(difference) < 1.0:
        return "about the same as"
    return f"{abs(difference):.1f} {'better' if difference > 0 else 'worse'} than"


def write_results(results: list[ArmResult], settings: DemoSettings) -> tuple[Path, Path]:
    """Write the picture and the numbers; return their paths."""
    output_dir = Path(settings.output_dir)
    figure_path, results_path = output_dir / FIGURE_FILE, output_dir / RESULTS_FILE
    curves = [TrainingCurve(r.name, r.loss_steps, r.losses, r.update_steps, r.update_sizes) for r in results]
    title = f"German to English, {settings.num_layers}+{settings.num_layers} post-norm layers, seed {settings.seed}"
    draw_training_curves(figure_path, curves, title=title)
    content = {"settings": asdict(settings), "runs": [asdict(result) for result in results]}
    results_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return figure_path, results_path


def run_demo(settings: DemoSettings) -> list[ArmResult]:
    """Load the corpus, train the settings, print the table and write picture and numbers."""
    from hf_v0init.tasks.tokenizer_training import train_bpe_tokenizer
    from hf_v0init.tasks.translation.embedded_corpus import load_embedded_corpus

    console = Console(highlight=False)
    started = time.perf_counter()
    for name in (FIGURE_FILE, RESULTS_FILE):  # of an earlier call
        Path(settings.output_dir, name).unlink(missing_ok=True)
    corpus = load_embedded_corpus(settings.num_pairs, large=True)
    train = corpus["train"]
    texts = [text for pair in zip(train["source"], train["target"], strict=True) for text in pair]
    tokenizer = train_bpe_tokenizer(texts, settings.vocab_size, for_translation=True)
    tokenizer.save_pretrained(Path(settings.output_dir) / TOKENIZER_FOLDER)
    console.print(
        f"Corpus: {len(train):,} training pairs, {len(corpus['validation'])} validation, "
        f"{min(settings.num_test, len(corpus['test']))} test, without overlap; joint BPE of {len(tokenizer)}. For example:"
    )
    for row in corpus["test"].select(range(min(3, len(corpus["test"])))):
        console.print(f"  {row['source']}  ->  {row['target']}", style="dim")
    results = train_arms(settings, console)
    figure_path, results_path = write_results(results, settings)

    table = Table(
        title=f"{len(results)} runs, one seed, {settings.steps:,} steps, {results[0].num_parameters:,} parameters"
    )
    for heading in ("run", "warmup steps", "BLEU", "chrF", "validation loss", "seconds"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for r in results:
        table.add_row(
            r.name,
            str(r.warmup_steps),
            f"{r.bleu:.1f}",
            f"{r.chrf:.1f}",
            f"{r.validation_loss:.3f}",
            f"{r.seconds:.0f}",
        )
    console.print(table)
    console.print(f"BLEU, chrF: {settings.num_test} test sentences, greedy; {results[0].bleu_signature}", style="dim")
    console.print(describe_outcome(results, settings))
    console.print(f"Picture: {figure_path}", soft_wrap=True)
    console.print(f"Numbers: {results_path}", soft_wrap=True)
    console.print(f"Models:  {Path(settings.output_dir)}/{{{','.join(FOLDERS.values())}}}", soft_wrap=True)
    console.print(f"In all {time.perf_counter() - started:.0f} seconds.")
    return results


def main(argv: list[str]) -> None:
    """Read the flags and run the demo."""
    run_demo(read_settings(argv))


if __name__ == "__main__":
    try:
        from hf_v0init.tasks.script_support import run_script
    except KeyboardInterrupt:
        sys.exit(130)
    run_script(main)
