"""Evaluation and test batches of samples of like length: less padding, and a generation ends when its few longest end.

Metrics over a whole set do not depend on its order; what `predict` returns is put back into the order of the data set.
"""

import contextlib

import datasets
import numpy as np
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import EvalPrediction, PredictionOutput


def find_length_order(dataset: datasets.Dataset) -> np.ndarray:
    """Find the order from the longest "input_ids" to the shortest; equals stay as they are. Shape (samples,), int64."""
    lengths = [len(ids) for rows in dataset.select_columns(["input_ids"]).iter(1000) for ids in rows["input_ids"]]
    return np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")


class LengthSortedEvaluationMixin(Seq2SeqTrainer):
    """Put before a Seq2SeqTrainer whose evaluation sets are `datasets.Dataset`s with "input_ids"; others are left as they are."""

    def get_eval_dataloader(self, eval_dataset=None):
        """Make the batches of an evaluation as the Trainer does, of the sorted set."""
        return super().get_eval_dataloader(_sort(self.eval_dataset if eval_dataset is None else eval_dataset))

    def get_test_dataloader(self, test_dataset):
        """Make the batches of a prediction as the Trainer does, of the sorted set."""
        return super().get_test_dataloader(_sort(test_dataset))

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        """Evaluate as the Trainer does; `compute_metrics` gets predictions and labels in the order of the data set."""
        with self._in_order_of(self.eval_dataset if eval_dataset is None else eval_dataset):
            return super().evaluate(eval_dataset, *args, **kwargs)

    @contextlib.contextmanager
    def _in_order_of(self, dataset):
        compute_metrics = self.compute_metrics
        if compute_metrics is None or not _is_sortable(dataset):
            yield
            return
        places = np.argsort(find_length_order(dataset))

        def compute_in_order(evaluation, **options):
            rows = [
                part[places] if isinstance(part, np.ndarray) and len(part) == len(places) else part
                for part in (evaluation.predictions, evaluation.label_ids)
            ]
            return compute_metrics(EvalPrediction(predictions=rows[0], label_ids=rows[1]), **options)

        self.compute_metrics = compute_in_order
        try:
            yield
        finally:
            self.compute_metrics = compute_metrics

    def predict(self, test_dataset, *args, **kwargs) -> PredictionOutput:
        """Predict as the Trainer does; predictions and labels are in the order of `test_dataset`, also for `compute_metrics`."""
        with self._in_order_of(test_dataset):
            output = super().predict(test_dataset, *args, **kwargs)
        if not _is_sortable(test_dataset):
            return output
        places = np.argsort(find_length_order(test_dataset))  # where each sample has gone
        predictions, labels = (
            rows[places] if isinstance(rows, np.ndarray) and len(rows) == len(places) else rows
            for rows in (output.predictions, output.label_ids)
        )
        return PredictionOutput(predictions=predictions, label_ids=labels, metrics=output.metrics)


def _is_sortable(dataset) -> bool:
    return isinstance(dataset, datasets.Dataset) and "input_ids" in dataset.column_names


def _sort(dataset):
    return dataset.select(find_length_order(dataset)) if _is_sortable(dataset) else dataset
