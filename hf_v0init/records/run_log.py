"""Records a run so that it can be compared with others: its log as JSON lines, and fingerprints of how it began.

`--v0_record_run` writes into the output folder, on the main process:

| file | what |
| --- | --- |
| `run_log.jsonl` | one object a log of the Trainer: its figures, `step`, and `train_seconds` since `train()` began, the v0 pass included and evaluations left out |
| `fingerprint.json` | SHA-256 of the initial weights, of the batches of the first four optimizer steps and of torch's random state before the first step |
| `v0_init.json` | what was done about v0, as beside a checkpoint, also of a run that saves nothing |

Runs that are to differ in the optimizer alone must have equal fingerprints: the same weights, the same data in the same
order, the same dropout. Of sharded weights and distributed data the main process's own part is taken. The run itself is
not touched: no random number is drawn, nothing is added to `log_history`.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from transformers import TrainerCallback

from .report import write_report
from .run_files import write_whole

LOG_FILE = "run_log.jsonl"
FINGERPRINT_FILE = "fingerprint.json"
NUM_BATCHES = 4


class RunRecordCallback(TrainerCallback):
    """Writes `run_log.jsonl` and `fingerprint.json`; see the top of the file.

    Must be the first callback, so that its clock starts before v0 is computed. `record_batches` is called by the Trainer.

    Args:
        get_v0_report: returns what was done about v0 so far, None if nothing.
    """

    def __init__(self, get_v0_report: Callable[[], dict | None] = lambda: None) -> None:
        self._get_v0_report = get_v0_report
        self._v0_report: dict | None = None  # as it was written
        self._watches = False
        self._began = 0.0  # on the clock of `train_seconds`
        self._fingerprint: dict | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Start the clocks, and take the fingerprint of the weights."""
        self._watches = args.process_index == 0
        if not self._watches:
            return
        self._folder, self._device = Path(args.output_dir), args.device
        self._folder.mkdir(parents=True, exist_ok=True)
        self._began = time.perf_counter() - _keep_log_until(self._folder / LOG_FILE, state.global_step)
        self._fingerprint = self._v0_report = None
        if state.global_step == 0:
            self._fingerprint = {"initial_weights": hash_tensors(model.named_parameters()), "batches": [], "rng": None}

    def record_batches(self, micro_batches: list) -> None:
        """Add the fingerprint of the batches of one optimizer step, up to the first four, and at the first that of the random state."""
        found = self._fingerprint
        if found is None or len(found["batches"]) == NUM_BATCHES:
            return
        if not found["batches"]:
            states = [("cpu", torch.get_rng_state())]
            if self._device.type == "cuda":
                states.append(("cuda", torch.cuda.get_rng_state(self._device)))
            found["rng"] = hash_tensors(states)
        named = [
            (f"{i}.{name}", value) for i, batch in enumerate(micro_batches) for name, value in _list_tensors(batch)
        ]
        found["batches"].append(hash_tensors(named))
        write_whole(self._folder / FINGERPRINT_FILE, json.dumps(found, indent=1) + "\n")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write one line of the log."""
        if not self._watches or not logs:
            return
        self._began += sum(value for name, value in logs.items() if _is_evaluation_time(name))
        clock = {"step": state.global_step, "train_seconds": time.perf_counter() - self._began}
        figures = {name: value for name, value in logs.items() if isinstance(value, int | float | str)}
        self._write_v0_report()  # for a run that will be cut off
        with open(self._folder / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures | clock) + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        """Write what was done about v0."""
        self._fingerprint = None  # batches that are fetched later are not the run's
        if self._watches:
            self._write_v0_report()

    def _write_v0_report(self) -> None:
        report = self._get_v0_report()
        if report is not None and report != self._v0_report:
            write_report(report, self._folder)
            self._v0_report = report


def hash_tensors(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Compute the SHA-256, as hex, of names, dtypes, shapes and values of tensors, in their order; of DTensors the local part."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors:
        tensor = tensor.detach()
        tensor = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _list_tensors(batch) -> list[tuple[str, torch.Tensor]]:
    if isinstance(batch, torch.Tensor):
        return [("", batch)]
    items = sorted(batch.items()) if isinstance(batch, Mapping) else enumerate(batch)
    return [(str(name), value) for name, value in items if isinstance(value, torch.Tensor)]


def _is_evaluation_time(name: str) -> bool:
    return name.endswith("_runtime") and name != "train_runtime"


def _keep_log_until(path: Path, step: int) -> float:
    """Drop what a continued run will log again, or a new run's predecessor logged; return the seconds trained so far."""
    kept = []
    if step > 0 and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the line that a killed run did not finish
            if entry["step"] <= step:
                kept.append(entry)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    return kept[-1]["train_seconds"] if kept else 0.0
