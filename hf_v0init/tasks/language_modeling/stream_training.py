"""Training on contiguous streams: the state of one batch is where the next begins (truncated back-propagation through time).

| when | the state |
| --- | --- |
| first batch of an epoch, of an evaluation | zeros |
| next batch, the micro-batches of one accumulated step included | that after the batch before, without its graph |
| evaluation, v0's look at the first step | its own; training's is set aside and put back |
| v0's statistics: segments drawn at random | that after the segment before, run without gradient from zeros; no other is touched |
| checkpoint | training's, of each process, in `stream_state*.pt`; a resumed run goes on from it |

Weight drop and embedding dropout have one mask a batch, so the gradients of a batch's segments are not independent, and E[g^2] of
single segments is exact only with `v0_stats_batch_size` 1: with the masks of batches of 15 it came out 1.6 times too large for
hidden-to-hidden matrices (2 layers of 200, weight drop 0.2, Penn Treebank), and within 7% of it for the other matrices. For
`v0_estimator` "minibatch" take the training batch size.

With varying segment lengths the learning rate of each step is multiplied by (tokens of its segments) / (usual length), as in
AWD-LSTM (Merity et al., section 5).
"""

import logging
import os
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainingArguments

from ...errors import InputError
from .token_streams import SegmentCollator, SegmentsWithContext, TokenStreams

logger = logging.getLogger("hf_v0init")

STATE_FILE = "stream_state"


class _ScaleLearningRate(TrainerCallback):
    """Multiplies the learning rate for the time of one optimizer step by the length of that step's segments."""

    def __init__(self, trainer: "ContiguousStreamsMixin") -> None:
        self.trainer = trainer
        self.rates: list | None = None

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        lengths, self.trainer._segment_lengths = self.trainer._segment_lengths, []
        factor = sum(lengths) / len(lengths) / self.trainer.train_dataset.segment_length
        self.rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate


class ContiguousStreamsMixin:
    """Put before a Trainer of a model that takes and returns `state`: `TokenStreams` are read in order, with the state carried.

    Other data sets are trained on as ever. Give `data_collator=SegmentCollator(...)`, and streams that are as many as a batch of all
    processes has rows. The loss of training, and so of v0's statistics, is the model's with its regularisers; that of evaluation
    is the model's without.

    Raises:
        InputError: before any training, for settings under which batches would not be continuations of each other.
    """

    _state: tuple | None = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._segment_lengths: list[int] = []  # of the micro-batches of the current step
        streams = [data for data in (self.train_dataset, self.eval_dataset) if isinstance(data, TokenStreams)]
        if streams:
            varies = streams[0].varies
            _require_possible_streams(self.args, varies)
            if varies:
                self.add_callback(_ScaleLearningRate(self))

    # ---- the loss, from the state and to the state -------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss as the Trainer does, from the carried state; see the table at the top of the file."""
        if "begins_stream" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        begins_stream, contexts = inputs.pop("begins_stream"), inputs.pop("context_ids", None)
        if contexts is not None:
            state = self._compute_states(model, contexts)
        else:
            if self._state is None and not begins_stream:
                logger.warning("the state at this point of the streams is not known: it is taken to be zero")
            state = None if begins_stream else self._state
        loss, outputs = super().compute_loss(model, inputs | {"state": state}, True, num_items_in_batch)
        if contexts is None:
            state = outputs["state"] if isinstance(outputs, dict) else outputs[-1]
            self._state = tuple(tuple(part.detach() for part in layer) for layer in state)
            self._segment_lengths.append(inputs["input_ids"].shape[1])
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _compute_states(self, model, contexts: list[torch.Tensor]) -> tuple:
        """The state after each context, with the dropout of training but without a graph; zeros where there is no context."""
        with self.compute_loss_context_manager():
            make_zeros = self.accelerator.unwrap_model(model).make_zero_state
            states = [model(context).state if context.numel() else make_zeros(1) for context in contexts]
        return tuple(
            tuple(torch.cat(parts) for parts in zip(*layers, strict=True)) for layers in zip(*states, strict=True)
        )

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate as the Trainer does; training's state is set aside, and put back."""
        before = self._state, self._segment_lengths
        self._state, self._segment_lengths = None, []
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._state, self._segment_lengths = before

    # ---- what v0 looks at --------------------------------------------------------------------------------------------

    def get_v0_dataset(self):
        """Return what the paper's pass draws samples from: segments that bring their context along."""
        streams = self.train_dataset
        return SegmentsWithContext(streams) if isinstance(streams, TokenStreams) else streams

    # ---- batches in order --------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, TokenStreams):
            return SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        if isinstance(data_collator, SegmentCollator):
            return data_collator  # what it adds for this class is no input of the model
        return super()._get_collator_with_removed_columns(data_collator, description)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._state is not None:
            torch.save(self._state, self._name_state_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not isinstance(self.train_dataset, TokenStreams):
            return
        path = self._name_state_file(checkpoint)
        num_rows = 0  # also of a checkpoint of another number of processes, which has other files
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._state = tuple(tuple(part.to(self.args.device) for part in layer) for layer in state)
            num_rows = len(state[0][0])
        elif not any(Path(checkpoint).glob(f"{STATE_FILE}*.pt")):
            return  # saved without optimizer and random states; `compute_loss` says what follows
        if num_rows != self.args.train_batch_size:
            raise InputError(
                f"{checkpoint}: was saved with other streams than this run's {self.args.train_batch_size} on each of "
                f"{self.args.world_size} process(es); resume with its number of processes and per_device_train_batch_size"
            )

    def _name_state_file(self, folder: str) -> Path:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(os.path.join(folder, f"{STATE_FILE}{rank}.pt"))


def _require_possible_streams(args: TrainingArguments, varies: bool) -> None:
    """Raise `InputError` for settings under which batches of `TokenStreams` would not be continuations of each other."""
    config = args.accelerator_config
    for is_set, name, remedy in (
        (args.auto_find_batch_size, "auto_find_batch_size", "set the batch size"),
        (args.n_gpu > 1, f"DataParallel over {args.n_gpu} GPUs", "start one process per GPU with torchrun"),
        (config.split_batches, "split_batches", "leave it out"),
        (config.dispatch_batches, "dispatch_batches", "leave it out"),
        (not args.dataloader_in_order, "dataloader_in_order=False", "leave it out"),
        (
            varies and args.dataloader_persistent_workers,
            "dataloader_persistent_workers",
            "it needs segments of one length",
        ),
        (varies and args.deepspeed_plugin, "DeepSpeed", "it needs segments of one length"),
    ):
        if is_set:
            raise InputError(f"{name}: not with contiguous streams; {remedy}")
