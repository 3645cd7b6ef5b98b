"""Trains a GAN with accelerate: two networks, two optimizers, each with a v0 of its own. Knows no files of images.

A step, as in DCGAN: noise -> images; the discriminator's step on real and generated images; the generator's step through the
new discriminator. In the statistics passes both networks stand as they were initialised: the discriminator's loss is that of
pairs of a real and a generated image, the generator's goes through the discriminator, whose gradients are not kept.

Logs, evaluations and checkpoints come when transformers' Trainer would make them, under its names and in its files. `eval_loss`
is the Frechet distance of generated images to the training images. With several processes (DDP) each has its own images and
noise, and its batch norms see its own batch; the first one's running statistics are saved and evaluated.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback

from ...diagnostics.callback import DIAGNOSTICS_FILE, V0DiagnosticsCallback
from ...errors import InputError
from ...records.model_card import add_v0_section
from ...records.report import write_report
from ...records.run_log import RunRecordCallback
from ...sharding.processes import raise_together
from ...state_guard import preserve_rng, seed_everything
from ..images.tensors import round_to_pixels, scale_pixels, write_image_grid
from .checkpoints import load_gan_checkpoint, save_gan_checkpoint
from .dcgan import compute_discriminator_loss, compute_generator_loss, draw_noise
from .image_quality import ImageQuality
from .network_optimizers import build_optimizer, build_schedule
from .v0 import attach_gan_v0, compose_record, describe_settings, find_setting_differences, takes_pass, write_gan_v0

logger = logging.getLogger("hf_v0init")

SAMPLES_FOLDER = "samples"
NUM_SAMPLES, SAMPLE_COLUMNS = 64, 8
GENERATION_BATCH = 256
SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "MULTI_MLU", "MULTI_HPU")


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


class GanTrainer:
    """Trains generator and discriminator, and measures the generator.

    Args:
        generator: maps noise (n, latent_size) to images in [-1, 1]; has `latent_size` and `save_pretrained`.
        discriminator: maps images to logits (n,); has `save_pretrained`.
        pixels: the training images, uint8, shape (n, channels, height, width), on the CPU.
        training: `V0InitTrainingArguments`.
        quality: measures; None if nothing is to be evaluated.
        num_eval_images: images generated for a measurement.

    Raises:
        InputError: optimizers or schedules that cannot be built, too few images, a kind of process that is not supported.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        pixels: torch.Tensor,
        training,
        quality: ImageQuality | None = None,
        num_eval_images: int = 10_000,
    ) -> None:
        self.training, self.pixels, self.quality, self.num_eval_images = training, pixels, quality, num_eval_images
        self.networks = {"generator": generator, "discriminator": discriminator}
        # Buffers stay each process's own: a broadcast between two forwards would spoil the first one's backward.
        options = DistributedDataParallelKwargs(broadcast_buffers=False)
        precision = "bf16" if training.bf16 else "no"
        self.accelerator = Accelerator(cpu=training.use_cpu, mixed_precision=precision, kwargs_handlers=[options])
        self._require_supported()
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        batch_size = training.per_device_train_batch_size
        self.order = ImageOrder(len(pixels), batch_size, training.seed, rank, world_size)
        self.max_steps = training.max_steps
        if self.max_steps <= 0:
            self.max_steps = math.ceil(training.num_train_epochs * self.order.steps_per_epoch)
        self.wrapped = {name: self.accelerator.prepare(network) for name, network in self.networks.items()}
        self.optimizers = {name: build_optimizer(network, training) for name, network in self.networks.items()}
        self.prepared_optimizers = {name: self.accelerator.prepare(each) for name, each in self.optimizers.items()}
        self.schedules = {
            name: build_schedule(optimizer, training, self.max_steps) for name, optimizer in self.optimizers.items()
        }
        self.v0_report: dict | None = None
        self._sums, self._num_summed = self._make_sums(), 0
        seed_everything(training.seed + rank)  # the noise differs between processes
        self.state, self.control = TrainerState(), TrainerControl()
        self._set_place()
        self._measured: tuple[int, dict] | None = None
        self._make_callbacks()

    def _require_supported(self) -> None:
        kind = self.accelerator.distributed_type
        if getattr(kind, "value", kind) not in SUPPORTED:
            raise InputError(
                f"a GAN trains here in one process or several joined by DDP, not under {DistributedType(kind).value}; start it with "
                "torchrun, or `accelerate launch --multi_gpu`"
            )
        if self.training.n_gpu > 1:
            raise InputError(
                f"one process sees {self.training.n_gpu} GPUs, and a GAN trains here on one GPU a process: start "
                f"`torchrun --nproc_per_node {self.training.n_gpu}`, or set CUDA_VISIBLE_DEVICES=0"
            )

    def _set_place(self) -> None:
        self.state.is_world_process_zero = self.accelerator.is_main_process
        self.state.is_local_process_zero = self.accelerator.is_local_main_process
        self.state.max_steps = self.max_steps
        self.state.compute_steps(self.training, self.max_steps)

    def _make_callbacks(self) -> None:
        self.callbacks = [DefaultFlowCallback()]
        if self.accelerator.is_main_process:
            self.callbacks.append(PrinterCallback() if self.training.disable_tqdm else ProgressCallback())
        self.diagnostics: dict[str, V0DiagnosticsCallback] = {}
        if self.training.v0_record_run:
            self.run_record = RunRecordCallback()
            self.callbacks.insert(0, self.run_record)  # its clock starts before v0 is computed
            path = Path(DIAGNOSTICS_FILE)
            files = {"generator": path.name, "discriminator": f"{path.stem}_discriminator{path.suffix}"}
            self.diagnostics = {name: V0DiagnosticsCallback(file_name=file) for name, file in files.items()}

    def _call(self, event: str, **options) -> None:
        for callback in [*self.callbacks, *self.diagnostics.values()]:
            getattr(callback, event)(self.training, self.state, self.control, **options)

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, checkpoint: str | None = None, on_ready=lambda: None) -> dict[str, float]:
        """Train up to the last step, from a checkpoint if one is given.

        Args:
            on_ready: called when v0 is written and nothing stands between the run and its first step.

        Returns:
            `train_loss` (both networks' together, mean over the steps that this call logged, nats), times and rates.

        Raises:
            InputError: what `initialize_v0` and `load_gan_checkpoint` refuse.
            DivergedError: at a log, a loss was no finite number.
        """
        if checkpoint is not None:
            self._resume(checkpoint)
        first_step, self._total_loss, self._total_steps = self.state.global_step, 0.0, 0
        self._call("on_train_begin", model=nn.ModuleDict(self.networks))
        start = time.perf_counter()
        self.first_steps = attach_gan_v0(self.training, self.networks, self.prepared_optimizers, self.max_steps)
        if checkpoint is not None and self.v0_report is None:
            for steps in self.first_steps.values():
                steps.remove()  # of a run without a v0
        elif "measuring" in (self.v0_report or {}):
            for name, steps in self.first_steps.items():
                steps.load_state_dict(self.v0_report["measuring"][name])
        if checkpoint is None and takes_pass(self.training):
            self.v0_report = write_gan_v0(
                self.training,
                self.wrapped,
                self.networks,
                self.prepared_optimizers,
                accelerator=self.accelerator,
                num_images=len(self.pixels),
                num_first=len(self.order.get(0)),
                take_images=self._take_images,
                generate=lambda num: self.networks["generator"](self._draw_noise(num)),
                max_steps=self.max_steps,
            )
        on_ready()
        if self.training.eval_on_start and checkpoint is None:
            self._evaluate_and_log()
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
        metrics["train_samples_per_second"] = num_images / seconds
        metrics["train_steps_per_second"] = num_steps / seconds
        self._log(metrics)
        return metrics | {"train_samples": len(self.pixels), "epoch": self.state.epoch}

    def _step(self) -> None:
        real = self._take_images(self.order.get(self.state.global_step))
        if self.training.v0_record_run:
            self.run_record.record_batches([real])
        self._call("on_step_begin")
        generated = self.wrapped["generator"](self._draw_noise(len(real)))
        loss, *logits = compute_discriminator_loss(self.wrapped["discriminator"], real, generated.detach())
        self._update("discriminator", loss)
        with _without_gradients(self.networks["discriminator"]):
            generator_loss = compute_generator_loss(self.networks["discriminator"], generated)
            self._update("generator", generator_loss)
        figures = [loss.detach(), generator_loss.detach(), *(torch.sigmoid(each).mean() for each in logits)]
        self._sums += torch.stack(figures)
        self._num_summed += 1
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.order.steps_per_epoch

    def _update(self, name: str, loss: torch.Tensor) -> None:
        """Make one optimizer step of one network."""
        self.accelerator.backward(loss)
        if self.training.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.networks[name].parameters(), self.training.max_grad_norm)
        where = {"optimizer": self.optimizers[name]}
        if name in self.diagnostics:
            self.diagnostics[name].on_pre_optimizer_step(self.training, self.state, self.control, **where)
        self.prepared_optimizers[name].step()
        if name in self.diagnostics:
            self.diagnostics[name].on_optimizer_step(self.training, self.state, self.control, **where)
        self.schedules[name].step()
        self.prepared_optimizers[name].zero_grad()

    def _take_v0_record(self) -> None:
        """Bring the record of v0 up to date, in the first steps."""
        if not self.first_steps or (self.v0_report is not None and "measuring" not in self.v0_report):
            return
        reports = {name: steps.report for name, steps in self.first_steps.items()}
        if all(reports.values()):
            self.v0_report = compose_record(self.training, {name: report.to_dict() for name, report in reports.items()})
        else:
            measuring = {name: steps.state_dict() | {"held": {}} for name, steps in self.first_steps.items()}
            self.v0_report = {
                "strategy": self.training.v0_init,
                "measuring": measuring,
                "settings": describe_settings(self.training),
            }

    def _follow_control(self) -> None:
        """Log, evaluate and save if it is time to."""
        self._take_v0_record()
        self._call("on_step_end")
        if self.state.global_step % self.order.steps_per_epoch == 0:
            self._call("on_epoch_end")
        if self.control.should_log or self.state.global_step == self.max_steps:
            self._log_losses()
        if self.control.should_evaluate:
            self._evaluate_and_log()
        if self.control.should_save:
            self._save()
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def _make_sums(self) -> torch.Tensor:
        return torch.zeros(4, device=self.accelerator.device)

    def _log_losses(self) -> None:
        means = (self.accelerator.reduce(self._sums, reduction="mean") / self._num_summed).tolist()
        self._total_loss += (means[0] + means[1]) * self._num_summed
        self._total_steps += self._num_summed
        self._sums, self._num_summed = self._make_sums(), 0
        names = ("discriminator_loss", "generator_loss", "real_judged_real", "generated_judged_real")
        figures = {"loss": means[0] + means[1]} | dict(zip(names, means, strict=True))
        self._log(figures | {"learning_rate": self.schedules["generator"].get_last_lr()[0]})
        if not math.isfinite(figures["loss"]):
            self.save_state()
            raise DivergedError(
                f"the loss is {figures['loss']} at step {self.state.global_step}: training has diverged; lower --learning_rate"
            )

    def _log(self, figures: dict[str, float]) -> None:
        figures = figures | {"epoch": round(self.state.epoch or 0.0, 4)}
        self.state.log_history.append(figures | {"step": self.state.global_step})
        self._call("on_log", logs=figures)

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _take_images(self, numbers: torch.Tensor) -> torch.Tensor:
        return scale_pixels(self.pixels[numbers.cpu()].to(self.accelerator.device))

    def _draw_noise(self, num: int) -> torch.Tensor:
        return draw_noise(num, self.networks["generator"].latent_size).to(self.accelerator.device)

    def _resume(self, checkpoint: str) -> None:
        self.state, self.v0_report, own = load_gan_checkpoint(
            checkpoint, self.accelerator, self.networks, self._get_stateful()
        )
        self._sums, self._num_summed = own["sums"].to(self.accelerator.device), own["num_summed"]
        self._set_place()
        differences = find_setting_differences(self.training, self.v0_report)
        if differences and self.accelerator.is_main_process:
            logger.warning(
                "v0 settings differ from the checkpoint's, whose optimizer state stands: " + "; ".join(differences)
            )

    def _get_stateful(self) -> dict:
        return {f"{name}_optimizer": each for name, each in self.optimizers.items()} | {
            f"{name}_schedule": each for name, each in self.schedules.items()
        }

    def _save(self) -> None:
        save_gan_checkpoint(
            self.training.output_dir,
            self.accelerator,
            self.networks,
            self._get_stateful(),
            self.state,
            self.v0_report,
            {"sums": self._sums.cpu(), "num_summed": self._num_summed},
            self.training.save_total_limit,
        )
        self._call("on_save")

    def save_state(self) -> None:
        """Write `trainer_state.json`, on the main process."""
        if self.accelerator.is_main_process:
            Path(self.training.output_dir).mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(Path(self.training.output_dir, "trainer_state.json")))

    def save_networks(self) -> None:
        """Write both networks into folders of their names, each with a model card that names its v0, on the main process."""
        if not self.accelerator.is_main_process:
            return
        reports = (self.v0_report or {}).get("networks", {})
        for name, network in self.networks.items():
            folder = Path(self.training.output_dir, name)
            network.save_pretrained(folder)
            card = folder / "README.md"
            card.write_text(add_v0_section(card.read_text(encoding="utf-8"), reports.get(name)), encoding="utf-8")
            if name in reports:
                write_report(reports[name], folder)

    @contextlib.contextmanager
    def on_main_process(self) -> Iterator[bool]:
        """Tell whether this is the main process; what fails inside on one process is raised on all."""
        error = None
        try:
            yield self.accelerator.is_main_process
        except Exception as exception:
            error = exception
        raise_together(error)

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
            with preserve_rng(), _in_evaluation_mode(self.networks["generator"]), torch.no_grad():
                metrics = self._measure()
            metrics["eval_runtime"] = time.perf_counter() - start
        self.accelerator.wait_for_everyone()
        self._measured = (self.state.global_step, metrics)
        return metrics

    def _measure(self) -> dict[str, float | str]:
        generator = self.networks["generator"]
        noise = draw_noise(
            self.num_eval_images, generator.latent_size, torch.Generator().manual_seed(self.training.seed)
        )
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

    def _evaluate_and_log(self) -> None:
        metrics = self.evaluate()
        if metrics:
            self._log(metrics)


@contextlib.contextmanager
def _without_gradients(network: nn.Module) -> Iterator[None]:
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


@contextlib.contextmanager
def _in_evaluation_mode(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
