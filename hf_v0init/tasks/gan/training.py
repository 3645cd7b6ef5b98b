"""The training of a GAN as a loop of accelerate: two networks, two optimizers, each with a v0 of its own. Knows no files of images.

A step, as in DCGAN: noise -> images; the discriminator's step on real and generated images; the generator's step through the
new discriminator. Logs, evaluations and checkpoints come when transformers' Trainer would make them, under its names and in its
files. `eval_loss` is the Frechet distance of generated images to the training images. With several processes (DDP) each has its
own images and noise, and its batch norms see its own batch; the first one's running statistics are saved and evaluated.
"""

import contextlib
import copy
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, set_seed
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

from hf_v0init import InputError, V0DiagnosticsCallback, V0InitArguments, V0InitTrainer, attach_v0, initialize_v0

from ...records.checkpoints import complete_save, delete_checkpoint, delete_old_checkpoints
from ...records.model_card import add_v0_section
from ...records.report import write_report
from ...records.run_log import RunRecordCallback
from ..images.tensors import round_to_pixels, scale_pixels, write_image_grid
from ..run_identity import RECORD_KEY
from .dcgan import compute_discriminator_loss, compute_generator_loss, draw_noise

logger = logging.getLogger("hf_v0init")

SAMPLES_FOLDER, NUM_SAMPLES, SAMPLE_COLUMNS = "samples", 64, 8
GENERATION_BATCH = 256
SCHEDULE_FILE = "scheduler.pt"  # as the Trainer names it
LOGGED = ("discriminator_loss", "generator_loss", "real_judged_real", "generated_judged_real")
V0_OPTIONS = ("v0_scale", "v0_decay_steps", "v0_estimation_steps", "v0_include_bias_and_norm", "v0_decay")
V0_SETTINGS = [name for name in V0InitArguments.__dataclass_fields__ if name != "v0_record_run"]
SUMMED = (
    "num_samples", "num_batches", "num_skipped", "seconds", "num_zero_elements", "num_parameters_with_v0",
    "num_parameters_without_v0", "num_elements_with_v0", "num_elements_without_v0",
)  # fmt: skip


class DivergedError(RuntimeError):
    """A loss is no finite number any more."""


class ImageOrder:
    """Which images each process sees at each step: epochs in an order drawn from the seed, without their last rest.

    Raises:
        InputError: there are too few images for one batch of all processes.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = num_images // (batch_size * world_size)
        if self.steps_per_epoch == 0:
            raise InputError(
                f"{num_images} training images are too few for {world_size} process(es) with --per_device_train_batch_size="
                f"{batch_size}; lower it, or start fewer processes"
            )
        self._epoch, self._order = -1, torch.empty(0)

    def get(self, step: int) -> torch.Tensor:
        """Return this process's image numbers at optimizer step `step`, counted from 0: int64, shape (batch_size,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num_images, generator=generator)
        start = (place * self.world_size + self.rank) * self.batch_size
        return self._order[start : start + self.batch_size]


class GanRun:
    """Generator and discriminator in training.

    Args:
        generator: maps noise (n, latent_size) to images in [-1, 1]; has `latent_size` and `save_pretrained`.
        discriminator: maps images to logits (n,); has `save_pretrained`.
        pixels: the training images, uint8, shape (n, channels, height, width), on the CPU.
        training: `V0InitTrainingArguments`.
        quality: an `ImageQuality`; None if nothing is to be evaluated.
        num_eval_images: images generated for a measurement.
        run_identity: what `describe_run` returned; kept in `trainer_state.json`.

    Raises:
        InputError: optimizers or schedules that cannot be built, too few images, a kind of process that is not supported.
    """

    def __init__(
        self, generator, discriminator, pixels, training, quality=None, num_eval_images=10_000, run_identity=None
    ):
        self.training, self.pixels, self.quality, self.num_eval_images = training, pixels, quality, num_eval_images
        self.networks: dict[str, nn.Module] = {"generator": generator, "discriminator": discriminator}
        # Buffers stay each process's own: a broadcast between two forwards would spoil the first one's backward.
        options = DistributedDataParallelKwargs(broadcast_buffers=False)
        precision = "bf16" if training.bf16 else "no"
        self.accelerator = Accelerator(cpu=training.use_cpu, mixed_precision=precision, kwargs_handlers=[options])
        kind = str(getattr(self.accelerator.distributed_type, "value", self.accelerator.distributed_type))
        if (kind != "NO" and not kind.startswith("MULTI_")) or training.n_gpu > 1:
            raise InputError(
                "a GAN trains here in one process, or in several with one GPU each joined by DDP; start it with torchrun, or set "
                "CUDA_VISIBLE_DEVICES=0"
            )
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.order = ImageOrder(len(pixels), training.per_device_train_batch_size, training.seed, rank, world_size)
        self.max_steps = training.max_steps
        if self.max_steps <= 0:
            self.max_steps = math.ceil(training.num_train_epochs * self.order.steps_per_epoch)
        made = {name: make_optimizer(network, training, self.max_steps) for name, network in self.networks.items()}
        self.wrapped = {name: self.accelerator.prepare(network) for name, network in self.networks.items()}
        self.optimizers = {name: optimizer for name, (optimizer, _) in made.items()}
        self.schedules = {name: schedule for name, (_, schedule) in made.items()}
        self.prepared = {name: self.accelerator.prepare(each) for name, each in self.optimizers.items()}
        self.accelerator.register_for_checkpointing(self)
        self.hooks, self.reports = {}, {}
        self._sums, self._num_summed, self._measured = self._make_sums(), 0, None
        set_seed(training.seed + rank)  # the noise differs between processes
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.stateful_callbacks = {RECORD_KEY: {"args": {}, "attributes": run_identity or {}}}
        self._set_place()
        self._make_callbacks()

    def _set_place(self) -> None:
        self.state.is_world_process_zero = self.accelerator.is_main_process
        self.state.is_local_process_zero = self.accelerator.is_local_main_process
        self.state.max_steps = self.max_steps
        self.state.compute_steps(self.training, self.max_steps)

    def _make_callbacks(self) -> None:
        self.callbacks: list = [DefaultFlowCallback()]
        if self.accelerator.is_main_process:
            self.callbacks.append(PrinterCallback() if self.training.disable_tqdm else ProgressCallback())
        self.diagnostics: dict[str, V0DiagnosticsCallback] = {}
        if self.training.v0_record_run:  # what `hf-v0init compare` reads
            self.run_record = RunRecordCallback()
            self.callbacks.insert(0, self.run_record)  # its clock starts before v0 is computed
            files = {"generator": "v0_diagnostics.json", "discriminator": "v0_diagnostics_discriminator.json"}
            self.diagnostics = {name: V0DiagnosticsCallback(file_name=file) for name, file in files.items()}

    def _call(self, event: str, **options) -> None:
        for callback in [*self.callbacks, *self.diagnostics.values()]:
            getattr(callback, event)(self.training, self.state, self.control, **options)

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, checkpoint: str | None = None, on_ready=lambda: None) -> dict[str, float]:
        """Train up to the last step, from a checkpoint if one is given.

        Args:
            on_ready: called when v0 is chosen and nothing stands between the run and its first step.

        Returns:
            `train_loss` (both networks' together, mean over the steps that this call logged, nats), times and rates.

        Raises:
            InputError: a checkpoint of another run, or what `initialize_v0` refuses.
            DivergedError: at a log, a loss was no finite number.
        """
        if checkpoint is not None:
            self._resume(checkpoint)
        first_step, self._total_loss, self._total_steps = self.state.global_step, 0.0, 0
        self._call("on_train_begin", model=nn.ModuleDict(self.networks))
        start = time.perf_counter()
        if checkpoint is None:
            self._choose_v0()
        on_ready()
        if self.training.eval_on_start and checkpoint is None:
            self._log(self.evaluate())
        for network in self.wrapped.values():
            network.train()
        while self.state.global_step < self.max_steps:
            self._step()
            self._follow_control()
        self._call("on_train_end")
        seconds, num_steps = time.perf_counter() - start, self.state.global_step - first_step
        metrics = {"train_runtime": seconds}
        if self._total_steps:  # none, if the checkpoint was that of the last step
            metrics["train_loss"] = self._total_loss / self._total_steps
        num_images = num_steps * self.order.batch_size * self.order.world_size
        metrics |= {"train_samples_per_second": num_images / seconds, "train_steps_per_second": num_steps / seconds}
        self._log(metrics)
        return metrics | {"train_samples": len(self.pixels), "epoch": self.state.epoch}

    def _choose_v0(self) -> None:
        """Give both second moments a v0: by the paper's pass now, or at their own first step."""
        training = self.training
        if training.resolve().estimator == "per_sample":
            self.reports = estimate_v0(self)
            return
        options = {name: getattr(training, name) for name in V0_OPTIONS if hasattr(training, name)}
        seed = training.seed if training.v0_seed is None else training.v0_seed
        options |= {"v0_seed": seed, "max_steps": self.max_steps}
        for name, network in self.networks.items():
            hook = attach_v0(self.prepared[name], network, training.v0_init, **options)
            self.hooks |= {} if hook is None else {name: hook}

    def _step(self) -> None:
        real = self.take_images(self.order.get(self.state.global_step))
        if self.training.v0_record_run:
            self.run_record.record_batches([real])
        self._call("on_step_begin")
        generated = self.wrapped["generator"](self.draw(len(real)))
        loss, *logits = compute_discriminator_loss(self.wrapped["discriminator"], real, generated.detach())
        self._update("discriminator", loss)
        self.networks["discriminator"].requires_grad_(False)
        try:
            generator_loss = compute_generator_loss(self.networks["discriminator"], generated)
            self._update("generator", generator_loss)
        finally:
            self.networks["discriminator"].requires_grad_(True)
        self._sums += torch.stack([loss.detach(), generator_loss.detach(), *(torch.sigmoid(x).mean() for x in logits)])
        self._num_summed += 1
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.order.steps_per_epoch

    def _update(self, name: str, loss: torch.Tensor) -> None:
        """Make one optimizer step of one network."""
        self.accelerator.backward(loss)
        if self.training.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.networks[name].parameters(), self.training.max_grad_norm)
        watched = [self.diagnostics[name]] if name in self.diagnostics else []
        where = {"optimizer": self.optimizers[name]}
        for callback in watched:
            callback.on_pre_optimizer_step(self.training, self.state, self.control, **where)
        self.prepared[name].step()
        for callback in watched:
            callback.on_optimizer_step(self.training, self.state, self.control, **where)
        self.schedules[name].step()
        self.prepared[name].zero_grad()

    def _follow_control(self) -> None:
        """Log, evaluate and save if it is time to."""
        for name, hook in self.hooks.items():
            if name not in self.reports and hook.report is not None:
                self.reports[name] = hook.report.to_dict()
        self._call("on_step_end")
        if self.state.global_step % self.order.steps_per_epoch == 0:
            self._call("on_epoch_end")
        if self.control.should_log or self.state.global_step == self.max_steps:
            self._log_losses()
        if self.control.should_evaluate:
            self._log(self.evaluate())
        if self.control.should_save:
            self.save_checkpoint()
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def _make_sums(self) -> torch.Tensor:
        return torch.zeros(len(LOGGED), device=self.accelerator.device)

    def _log_losses(self) -> None:
        means = (self.accelerator.reduce(self._sums, reduction="mean") / self._num_summed).tolist()
        self._total_loss += (means[0] + means[1]) * self._num_summed
        self._total_steps += self._num_summed
        self._sums, self._num_summed = self._make_sums(), 0
        loss = means[0] + means[1]
        rate = self.schedules["generator"].get_last_lr()[0]
        self._log({"loss": loss} | dict(zip(LOGGED, means, strict=True)) | {"learning_rate": rate})
        if not math.isfinite(loss):
            self.save_state()
            raise DivergedError(
                f"the loss is {loss} at step {self.state.global_step}: training has diverged; lower --learning_rate"
            )

    def _log(self, figures: dict) -> None:
        if not figures:
            return
        figures = figures | {"epoch": round(self.state.epoch or 0.0, 4)}
        self.state.log_history.append(figures | {"step": self.state.global_step})
        self._call("on_log", logs=figures)

    def take_images(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return training images by their numbers, in [-1, 1]."""
        return scale_pixels(self.pixels[numbers.cpu()].to(self.accelerator.device))

    def draw(self, num: int) -> torch.Tensor:
        """Draw noise for so many images."""
        return draw_noise(num, self.networks["generator"].latent_size).to(self.accelerator.device)

    # ---- what is kept ------------------------------------------------------------------------------------------------

    @property
    def v0_record(self) -> dict | None:
        """What was done about v0, of both networks, as `v0_init.json` holds it; None before it is done."""
        return join_reports(self.reports) if len(self.reports) == len(self.networks) else None

    def state_dict(self) -> dict:
        """What a checkpoint holds beside networks, optimizers and random states; accelerate asks for it."""
        return {
            "num_processes": self.accelerator.num_processes,
            "optimizers": {name: type(each).__name__ for name, each in self.optimizers.items()},
            "sums": self._sums.cpu(),
            "num_summed": self._num_summed,
            "v0_settings": {name: getattr(self.training, name) for name in V0_SETTINGS},
            "reports": self.reports,
            "measuring": {name: hook.state_dict() for name, hook in self.hooks.items() if name not in self.reports},
        }

    def load_state_dict(self, saved: dict) -> None:
        """Take over what `state_dict` returned.

        Raises:
            InputError: it is of another number of processes, or of other optimizers.
        """
        if saved["num_processes"] != self.accelerator.num_processes:
            raise InputError(
                f"the checkpoint was written by {saved['num_processes']} process(es) and this run has "
                f"{self.accelerator.num_processes}: its noise and order of images would be others; start as many"
            )
        for name, kind in saved["optimizers"].items():
            if kind != type(self.optimizers[name]).__name__:
                raise InputError(
                    f"the checkpoint's {name} optimizer is {kind} and this run's {type(self.optimizers[name]).__name__}; use the "
                    "same, or start anew"
                )
        self._sums, self._num_summed = saved["sums"].to(self.accelerator.device), saved["num_summed"]
        self.reports = saved["reports"]
        now = {name: getattr(self.training, name) for name in V0_SETTINGS}
        changed = [
            f"{name}: {then} -> {now[name]}" for name, then in saved["v0_settings"].items() if now.get(name) != then
        ]
        if changed and self.accelerator.is_main_process:
            logger.warning(
                f"v0 settings differ from the checkpoint's, whose optimizer state stands, and whose record goes along: {'; '.join(changed)}"
            )
        if saved["measuring"]:
            self._choose_v0()
            for name, measuring in saved["measuring"].items():
                self.hooks[name].load_state_dict(measuring)

    def save_checkpoint(self) -> None:
        """Write `checkpoint-N` for step N, whole or not at all, and delete old ones beyond `save_total_limit`."""
        folder = Path(self.training.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        aside = folder.with_name(f".{folder.name}.partial")
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside))
        if self.accelerator.is_main_process:
            if self.v0_record is not None:
                write_report(self.v0_record, aside)
            torch.save({name: each.state_dict() for name, each in self.schedules.items()}, aside / SCHEDULE_FILE)
            self.state.save_to_json(str(aside / "trainer_state.json"))
            complete_save(aside)
            if folder.is_dir():
                delete_checkpoint(folder)
            aside.rename(folder)
            delete_old_checkpoints(self.training.output_dir, self.training.save_total_limit, newest=str(folder))
        self.accelerator.wait_for_everyone()
        self._call("on_save")

    def _resume(self, checkpoint: str) -> None:
        try:
            self.accelerator.load_state(checkpoint)
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{checkpoint}: is of other networks than this run's ({reason}); give their sizes"
            ) from error
        for name, state in torch.load(Path(checkpoint, SCHEDULE_FILE), weights_only=True).items():
            self.schedules[name].load_state_dict(state)
        record = self.state.stateful_callbacks
        self.state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
        self.state.stateful_callbacks = record
        self._set_place()

    def save_state(self) -> None:
        """Write `trainer_state.json`, on the main process."""
        if self.accelerator.is_main_process:
            Path(self.training.output_dir).mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(Path(self.training.output_dir, "trainer_state.json")))

    def save_networks(self) -> None:
        """Write both networks into folders of their names, each with a model card that names its v0, on the main process."""
        if not self.accelerator.is_main_process:
            return
        if self.v0_record is not None:
            Path(self.training.output_dir).mkdir(parents=True, exist_ok=True)
            write_report(self.v0_record, self.training.output_dir)
        for name, network in self.networks.items():
            folder = Path(self.training.output_dir, name)
            network.save_pretrained(folder)
            card = folder / "README.md"
            card.write_text(add_v0_section(card.read_text(encoding="utf-8"), self.reports.get(name)), encoding="utf-8")
            if name in self.reports:
                write_report(self.reports[name], folder)

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float | str]:
        """Measure generated images and write a grid of 64 of them. The noise is the same at every call; all else is kept.

        Returns:
            On the main process `eval_loss`, the Frechet distance; the same and the score under the names of `ImageQuality`
            after `eval_`; `eval_runtime` in seconds. NaN if the images are not finite. Elsewhere an empty dict.
        """
        if self._measured is not None and self._measured[0] == self.state.global_step:
            return self._measured[1]
        metrics: dict[str, float | str] = {}
        if self.accelerator.is_main_process:
            start = time.perf_counter()
            with torch.random.fork_rng(), _in_evaluation_mode(self.networks["generator"]), torch.no_grad():
                metrics = self._measure()
            metrics["eval_runtime"] = time.perf_counter() - start
        self.accelerator.wait_for_everyone()
        self._measured = (self.state.global_step, metrics)
        return metrics

    def _measure(self) -> dict[str, float | str]:
        generator = self.networks["generator"]
        fixed = torch.Generator().manual_seed(self.training.seed)
        noise = draw_noise(self.num_eval_images, generator.latent_size, fixed)
        batches = [generator(part.to(self.accelerator.device)) for part in noise.split(GENERATION_BATCH)]
        distance_name, _ = self.quality.names
        if not all(bool(batch.isfinite().all()) for batch in batches):
            return {"eval_loss": math.nan, f"eval_{distance_name}": math.nan}
        pixels = torch.cat([round_to_pixels(batch) for batch in batches])
        path = Path(self.training.output_dir, SAMPLES_FOLDER, f"step_{self.state.global_step}.png")
        write_image_grid(pixels[:NUM_SAMPLES], path, SAMPLE_COLUMNS)
        figures = self.quality.measure(pixels.split(GENERATION_BATCH))
        metrics: dict[str, float | str] = {"eval_loss": figures[distance_name]}
        metrics |= {f"eval_{name}": value for name, value in figures.items()}
        return metrics | {"eval_features": self.quality.extractor.name, "eval_samples": len(pixels)}


def make_optimizer(network: nn.Module, training, max_steps: int):
    """Make the optimizer and the schedule of one network: those of a Trainer with these flags, and nothing decays but matrices.

    Raises:
        InputError: there is no such optimizer or schedule, or the loop here cannot use it.
    """
    options = copy.copy(training)
    options.v0_init, options.v0_record_run, options.report_to = "zeros", False, []
    options.eval_strategy, options.save_strategy, options.eval_on_start = IntervalStrategy.NO, SaveStrategy.NO, False
    options.output_dir = tempfile.gettempdir()  # a Trainer makes its folder; this one writes nothing
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    name = training.v0_optimizer or getattr(training.optim, "value", training.optim)
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    if training.get_warmup_steps(max_steps) and schedule == "constant":
        raise InputError(
            f"warmup_steps={training.warmup_steps} with lr_scheduler_type=constant does nothing; use constant_with_warmup"
        )
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise InputError(
            f"lr_scheduler_type={schedule} follows a validation loss, which a GAN has none of; use another"
        )
    try:
        trainer = V0InitTrainer(model=network, args=options)
        chosen = trainer.optimizer_cls_and_kwargs or Trainer.get_optimizer_cls_and_kwargs(options, network)
        trainer.optimizer = chosen[0](groups, **chosen[1])
        scheduler = trainer.create_scheduler(max_steps, trainer.optimizer)
    except (TypeError, ValueError, AssertionError, ImportError, NotImplementedError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"optimizer {name} with schedule {schedule} cannot be built: {error}") from error
    if callable(getattr(trainer.optimizer, "train", None)):
        raise InputError(
            f"optimizer {name} keeps two sets of weights, for training and evaluation, which this loop does not switch; use "
            "another, such as adamw_torch"
        )
    return trainer.optimizer, scheduler


def estimate_v0(run: GanRun) -> dict[str, dict]:
    """Give both second moments the paper's data-driven v0, each from its own network's loss as it is before any step (eq. 10).

    The discriminator's loss is that of pairs of a real and a generated image; the generator's goes through the discriminator,
    whose gradients are not kept.

    Returns:
        The report of each network.
    """
    training, accelerator, networks = run.training, run.accelerator, run.networks
    seed = training.seed if training.v0_seed is None else training.v0_seed
    num_samples = min(training.resolve().num_samples, len(run.pixels))
    step_size = len(run.order.get(0))
    # With batch norms the gradient of an image depends on its batch: by default they are training's size.
    size = training.v0_stats_batch_size or max(1, min(step_size, num_samples // max(2, accelerator.num_processes)))
    samples = torch.tensor(random.Random(seed).sample(range(len(run.pixels)), num_samples))
    batches = list(samples.split(size))[accelerator.process_index :: accelerator.num_processes]

    def compute_generators(_: nn.Module, numbers: torch.Tensor) -> torch.Tensor:
        return compute_generator_loss(networks["discriminator"], networks["generator"](run.draw(len(numbers))))

    def compute_discriminators(discriminator: nn.Module, numbers: torch.Tensor) -> torch.Tensor:
        real = run.take_images(numbers)
        with torch.no_grad():
            generated = networks["generator"](run.draw(len(numbers)))
        return compute_discriminator_loss(discriminator, real, generated)[0]

    plan = training.resolve(run.max_steps)
    options = {"v0_scale": plan.scale, "v0_include_bias_and_norm": plan.include_bias_and_norm}
    options |= {"v0_decay_steps": plan.decay_steps}
    reports = {}
    for name, loss_fn in (("generator", compute_generators), ("discriminator", compute_discriminators)):
        report = initialize_v0(
            run.prepared[name],
            model=run.wrapped[name],
            batches=batches,
            loss_fn=loss_fn,
            accelerator=accelerator,
            v0_seed=seed,
            effective_batch_size=float(step_size * accelerator.num_processes),
            other_modules=[network for other, network in networks.items() if other != name],
            max_steps=run.max_steps,
            **options,
        )
        report.num_samples_requested = plan.num_samples
        reports[name] = report.to_dict()
    return reports


def join_reports(reports: dict[str, dict]) -> dict:
    """Join the networks' reports into one of the usual form, with each whole one under `networks`.

    What is the same in both is kept; counts and seconds are sums, v0 figures over the elements of both, `measured_ratio` the
    geometric mean.
    """
    first, *others = reports.values()
    joined = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    for key in SUMMED:
        joined[key] = sum(report.get(key) or 0 for report in reports.values())
    weights = [report["num_elements_with_v0"] for report in reports.values()]
    means = [report["v0_mean"] for report in reports.values()]
    joined["v0_mean"] = sum(w * m for w, m in zip(weights, means, strict=True)) / max(1, sum(weights))
    joined["v0_min"] = min(report["v0_min"] for report in reports.values())
    joined["v0_max"] = max(report["v0_max"] for report in reports.values())
    ratios = [report.get("measured_ratio") for report in reports.values()]
    joined["measured_ratio"] = None if None in ratios else math.prod(ratios) ** (1 / len(ratios))
    return joined | {"networks": reports}


@contextlib.contextmanager
def _in_evaluation_mode(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
