"""Trains and evaluates a masked language model (BERT), with a v0 for Adam if asked.

    python scripts/run_mlm.py FILE.yaml --v0_init data_driven --output_dir out
    torchrun --nproc_per_node 2 scripts/run_mlm.py FILE.yaml --output_dir out

FILE.yaml or FILE.json holds flags; flags on the command line override it; --help lists them all.

The text is one stream of tokens cut into blocks; or, with --line_by_line, one sample per line. Masks are drawn from seed,
epoch and the sample's number, so they depend neither on the batch size nor on the number of processes, nor on where a run
was resumed; those of evaluations are always the same. Losses are exact: each masked token of the set counts once.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from hf_v0init import V0InitTrainer, V0InitTrainingArguments

from ...errors import InputError
from ..probing import ProbeArguments, probe_and_print
from ..script_stages import flag
from ..script_support import explain_hub_errors, parse_arguments, run_script
from ..script_trainer import ScriptTrainerMixin
from ..step_decay import StepDecayMixin
from ..token_budget import TokenBudgetMixin
from ..token_loss import TokenCrossEntropy
from .masked_samples import Frame, FramedTexts, StreamedTexts, require_words, tokenize_words
from .masking import AnnounceEpoch, MaskedSamples, MaskedStream, Masking
from .model import MaskedModelArguments
from .perplexity import MaskedPerplexityMixin
from .rows import MaskedDataArguments
from .samples import PaddingCollator
from .shared_script import (
    LanguageRunArguments,
    begin_run,
    choose_map_options,
    finish,
    prepare_all_samples,
    prepare_run,
    train_and_evaluate,
)

NUM_GUESSES = 5
METRICS = ("loss", MaskedPerplexityMixin.perplexity_name, "accuracy", "num_tokens")
EXAMPLES = """
# BERT's architecture from scratch on a text file, with its data-driven v0
run_mlm.py --model_type bert --train_file train.txt --do_train --do_eval --v0_init data_driven --output_dir out
# flags from a file, whole words masked, the best checkpoint by its loss
run_mlm.py FILE.yaml --whole_word_mask --eval_strategy epoch --save_strategy best --metric_for_best_model loss
# go on with a pretrained model, one sample per line
run_mlm.py FILE.yaml --model_name_or_path bert-base-uncased --line_by_line
# two processes
torchrun --nproc_per_node 2 run_mlm.py FILE.yaml --output_dir out
"""


@dataclass
class MaskedRunArguments(LanguageRunArguments):
    """How a masked language model is trained, and what it writes at the end."""

    sample_text: str | None = flag(
        None,
        "At the end, list the likeliest tokens for each mask token in this text, such as 'the [MASK] rose' (of a tokenizer "
        "trained here the token is <mask>); printed and saved to filled_sample.txt.",
    )


class MaskedTrainer(ScriptTrainerMixin, MaskedPerplexityMixin, TokenBudgetMixin, StepDecayMixin, V0InitTrainer):
    """With exact evaluation over the masked tokens and, where asked, token-budget batches and step decay."""


def make_masking(tokenizer, data: MaskedDataArguments) -> Masking:
    """Make the rule by which tokens are masked; raise `InputError` for a tokenizer with which it cannot be followed."""
    if data.whole_word_mask:
        require_words(tokenizer)
    return Masking.for_tokenizer(
        tokenizer,
        probability=data.mlm_probability,
        mask_share=data.mask_replace_prob,
        random_share=data.random_replace_prob,
        whole_words=data.whole_word_mask,
    )


def make_frame(tokenizer, block_size: int) -> Frame:
    """Find the frame of the samples; raise `InputError` where a block has no room for more than it."""
    frame = Frame.of_tokenizer(tokenizer)
    if block_size <= len(frame):
        raise InputError(
            f"--block_size={block_size}: must be {len(frame) + 1} or more, for {len(frame)} tokens frame each sample"
        )
    return frame


def prepare_samples(rows, role: str, tokenizer, block_size: int, masking: Masking, data, training, cache_dir):
    """Blocks or lines with their masks: what the Trainer indexes or iterates."""
    has_separator = not data.line_by_line and tokenizer.sep_token_id is not None
    tokenized = tokenize_words(
        rows,
        tokenizer,
        *data.choose_text_columns(rows),
        separator=[tokenizer.sep_token_id] if has_separator else [],
        mark_words=data.whole_word_mask,
        **choose_map_options(data, training, cache_dir),
    )
    frame, limit = make_frame(tokenizer, block_size), data.get_limit(role)
    seed = None
    if role == "train":
        seed = training.seed if training.data_seed is None else training.data_seed
    if data.streaming:
        return MaskedStream(StreamedTexts(tokenized, block_size, frame, data.line_by_line), masking, seed, limit)
    cut = FramedTexts.take_lines if data.line_by_line else FramedTexts.cut_blocks
    return MaskedSamples(cut(tokenized, block_size, frame, limit), masking, seed)


@torch.no_grad()
def write_guesses(trainer: MaskedTrainer, text: str) -> None:
    """The likeliest tokens for each mask token of `text`, with their probabilities, printed and to filled_sample.txt."""
    tokenizer, network = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model).eval()
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"].to(network.device)
    logits = network(input_ids=input_ids).logits[input_ids == tokenizer.mask_token_id].float()
    lines = []
    for number, probabilities in enumerate(logits.softmax(dim=-1), start=1):
        best = probabilities.topk(min(NUM_GUESSES, len(probabilities)))
        guesses = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        words = ", ".join(f"{tokenizer.decode([token]).strip()} {probability:.3f}" for token, probability in guesses)
        lines.append(f"mask {number} of {text!r}: {words}")
    if trainer.is_world_process_zero():
        print("\n".join(lines))
        Path(trainer.args.output_dir, "filled_sample.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def require_mask_in_sample(tokenizer, text: str | None) -> None:
    """Refuse a sample text in which nothing is to be guessed."""
    if text is not None and tokenizer.mask_token_id not in tokenizer(text)["input_ids"]:
        raise InputError(f"--sample_text={text!r}: has no mask token; write {tokenizer.mask_token} where one is wanted")


ARGUMENTS = (MaskedModelArguments, MaskedDataArguments, MaskedRunArguments, ProbeArguments, V0InitTrainingArguments)


def main(argv: list[str]) -> None:
    """Do what the flags in `argv` say."""
    model_args, data_args, run_args, probe_args, training_args = parse_arguments(ARGUMENTS, argv, EXAMPLES)
    begun = begin_run(model_args, data_args, run_args, probe_args, training_args, METRICS)
    config, checkpoint = begun.config, begun.checkpoint

    prepared = prepare_run(model_args, data_args, run_args, training_args, config, checkpoint)
    tokenizer, block_size = prepared.tokenizer, prepared.block_size
    masking = make_masking(tokenizer, data_args)
    require_mask_in_sample(tokenizer, run_args.sample_text)
    make_frame(tokenizer, block_size)

    def prepare(rows, role: str):
        return prepare_samples(
            rows, role, tokenizer, block_size, masking, data_args, training_args, model_args.cache_dir
        )

    samples = prepare_all_samples(prepared, prepare, data_args, run_args, training_args)
    with explain_hub_errors(training_args):
        trainer = MaskedTrainer(
            model=prepared.network,
            args=training_args,
            train_dataset=samples.get("train"),
            eval_dataset=samples.get("validation"),
            processing_class=tokenizer,
            # A stream's batches are cut and joined across processes, so they must all be of one length.
            data_collator=PaddingCollator(tokenizer.pad_token_id, length=block_size if data_args.streaming else None),
            compute_loss_func=TokenCrossEntropy(training_args.label_smoothing_factor),
            max_tokens_per_batch=run_args.max_tokens_per_batch if training_args.do_train else None,
            step_decay=run_args,
            run_identity=begun.identity,
            callbacks=begun.callbacks,
        )
    if isinstance(samples.get("train"), MaskedSamples):
        trainer.add_callback(AnnounceEpoch(samples["train"]))

    if probe_args.probe_only:
        probe_and_print(trainer, probe_args)
        return
    train_and_evaluate(trainer, checkpoint, run_args, samples.get("test"))
    if run_args.sample_text is not None:
        write_guesses(trainer, run_args.sample_text)
    finish(trainer, "fill-mask", model_args, data_args)


if __name__ == "__main__":
    run_script(main)
