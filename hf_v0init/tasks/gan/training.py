"""The training of a GAN as a loop of accelerate: two networks, two optimizers, each with a v0 of its own. Knows no files of images.

A step, as in DCGAN: noise -> images; the discriminator's step on real and generated images; the generator's step through the
new discriminator. Logs, evaluations and checkpoints come when transformers' Trainer would make them, under its names and in its
files. `eval_loss` is the Frechet distance of generated images to the training images. With several processes (DDP) each has its
own images and noise, and its batch norms see its own batch; the first one's running statistics are saved and evaluated.
"""

import copy
import functools
import logging
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from transformers import TrainerControl, TrainerState, set_seed
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import save_metrics
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy, speed_metrics

from hf_v0init import InputError, V0InitArguments, V0InitTrainer, initialize_v0

from ...hook.v0_hook import V0Hook
from ...method.length import choose_length
from ...records.checkpoints import begin_save, complete_save, delete_checkpoint, delete_old_checkpoints
from ...records.model_card import add_v0_section
from ...records.report import find_differences, read_report, write_report
from ...records.run_log import RunRecordCallback
from ...settings import AUTO
from ...trainer.per_sample import choose_samples
from ...trainer.schedule import add_untuned_warmup, find_what_warms_up, keep_plateau, require_no_warmup
from ..images.format import round_to_pixels, scale_pixels, write_image_grid
from ..output_folder import STATE_FILE, make_run_record
from .dcgan import compute_discriminator_loss, compute_generator_loss, draw_noise

logger = logging.getLogger("hf_v0init")

SAMPLES_FOLDER, NUM_SAMPLES = "samples", 64
GENERATION_BATCH = 256
LOGGED = ("discriminator_loss", "generator_loss", "real_judged_real", "generated_judged_real")
SUMMED = ("num_samples", "num_batches", "num_skipped", "seconds")


@functools.lru_cache(maxsize=1)
def draw_order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """Draw in which order an epoch shows the images: int64, each number once."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def choose_images(num_images: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Choose the images of optimizer step `step`, counted from 0: epochs in a drawn order, without their last rest.

    Args:
        batch_size: images of a step, over all processes.

    Returns:
        Their numbers: int64, shape (batch_size,).
    """
    epoch, place = divmod(step, num_images // batch_size)
    return draw_order(num_images, seed, epoch)[place * batch_size : (place + 1) * batch_size]


class GanRun:
    """Generator and discriminator in training.

    Args:
        generator: maps noise (n, latent_size) to images in [-1, 1]; has `latent_size` and `save_pretrained`.
        discriminator: maps images to logits (n,); has `save_pretrained`.
        pixels: the training images, uint8, shape (n, channels, height, width), on the CPU.
        training: `V0InitTrainingArguments`.
        num_eval_images: images generated for a measurement.
        run_identity: what `describe_run` returned; kept in `trainer_state.json`.

    Attributes:
        quality: an `ImageQuality`, to be set where something is to be evaluated.

    Raises:
        InputError: optimizers or schedules that cannot be built, too few images, a kind of process that is not supported.
    """

    save_metrics = save_metrics  # the Trainer's

    def __init__(self, generator, discriminator, pixels, training, num_eval_images=10_000, run_identity=None):
        self.args, self.pixels, self.num_eval_images, self.quality = training, pixels, num_eval_images, None
        self.networks: dict[str, nn.Module] = {"generator": generator, "discriminator": discriminator}
        self.model = nn.ModuleDict(self.networks)
        self.accelerator = Accelerator(
            cpu=training.use_cpu,
            mixed_precision="bf16" if training.bf16 else "no",
            step_scheduler_with_optimizer=False,
            # Buffers stay each process's own: a broadcast between two forwards would spoil the first one's backward.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        kind = self.accelerator.distributed_type.value
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise InputError(
                f"a GAN trains here in one process, or in several joined by DDP, not by {kind}; use torchrun"
            )
        num_processes, size = self.accelerator.num_processes, training.per_device_train_batch_size
        self.batch_size = size * num_processes
        self.steps_per_epoch = len(pixels) // self.batch_size
        if self.steps_per_epoch == 0:
            raise InputError(
                f"{len(pixels)} training images are too few for {num_processes} process(es) with --per_device_train_batch_size="
                f"{size}; lower it, or start fewer processes"
            )
        epochs = math.ceil(training.num_train_epochs * self.steps_per_epoch)
        self.max_steps = training.max_steps if training.max_steps > 0 else epochs
        self.decay_steps = choose_decay_steps(training, self.max_steps)
        seed = training.seed if training.v0_seed is None else training.v0_seed
        self.plan = replace(training.resolve(self.max_steps), decay_steps=self.decay_steps, seed=seed)
        self.wrapped, self.optimizers, self.schedules = {}, {}, {}
        for name, network in self.networks.items():
            optimizer, schedule = make_optimizer(network, training, self.max_steps, self.decay_steps)
            self.wrapped[name], *_ = self.accelerator.prepare(network, optimizer, schedule)
            self.optimizers[name], self.schedules[name] = optimizer, schedule
        self.accelerator.register_for_checkpointing(self)
        self.hooks, self._saved_reports = {}, {}
        self._sums, self._num_summed = torch.zeros(len(LOGGED), device=self.accelerator.device), 0
        self._total_loss, self._total_steps = 0.0, 0
        self._measured: tuple[int, dict] = (-1, {})  # the step of the last evaluation, and what it gave
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=self.max_steps,
            is_world_process_zero=self.is_world_process_zero(),
            is_local_process_zero=self.accelerator.is_local_main_process,
            stateful_callbacks=make_run_record(run_identity),
        )
        self.state.compute_steps(training, self.max_steps)
        callbacks: list = [DefaultFlowCallback()]
        if self.is_world_process_zero():
            callbacks.append(PrinterCallback() if training.disable_tqdm else ProgressCallback())
        if training.v0_record_run:  # what `hf-v0init compare` reads
            self.run_record = RunRecordCallback()
            callbacks.insert(0, self.run_record)  # first, so that its clock starts before v0 is computed
        self.callbacks = CallbackHandler(callbacks, self.model, None, None, None)
        set_seed(training.seed + self.accelerator.process_index)  # the noise differs between processes

    def is_world_process_zero(self) -> bool:
        """Whether this is the main process."""
        return self.accelerator.is_main_process

    def _call(self, event: str, **options) -> None:
        getattr(self.callbacks, event)(self.args, self.state, self.control, **options)

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, checkpoint: str | None = None, on_ready=lambda: None) -> dict[str, float]:
        """Train up to the last step, from a checkpoint if one is given.

        Args:
            on_ready: called when v0 is chosen and nothing stands between the run and its first step.

        Returns:
            `train_loss` (both networks' together, mean over the steps that this call logged, nats), times and rates.

        Raises:
            InputError: a checkpoint of another run, or what `initialize_v0` refuses.
        """
        if checkpoint is not None:
            self._load_state(checkpoint)
            self.accelerator.load_state(checkpoint)
        first_step = self.state.global_step
        self._call("on_train_begin")
        start = time.time()
        if checkpoint is None and self.plan.estimator == "per_sample":
            self._saved_reports = self._estimate_v0()
        elif checkpoint is None:
            self.hooks = self._attach_v0()
        on_ready()
        if self.args.eval_on_start and checkpoint is None:
            self._log(self.evaluate())
        for network in self.wrapped.values():
            network.train()
        while self.state.global_step < self.max_steps:
            self._step()
            self._call("on_step_end")
            if self.state.global_step % self.steps_per_epoch == 0:
                self._call("on_epoch_end")
            if self.control.should_log or self.state.global_step == self.max_steps:
                self._log_losses()
            if self.control.should_evaluate:
                self._log(self.evaluate())
            if self.control.should_save:
                self.save_checkpoint()
        self._call("on_train_end")
        num_steps = self.state.global_step - first_step
        metrics = speed_metrics("train", start, num_steps * self.batch_size, num_steps)
        if self._total_steps:  # none, if the checkpoint was that of the last step
            metrics["train_loss"] = self._total_loss / self._total_steps
        self._log(metrics)
        return metrics | {"train_samples": len(self.pixels), "epoch": self.state.epoch}

    def _attach_v0(self) -> dict:
        """Attach v0 to both optimizers, in whose first steps it is written; return the hooks, none for "zeros"."""
        if self.plan.init == "zeros":
            return {}
        return {
            name: V0Hook(
                self.optimizers[name],
                network,
                self.plan,
                max_steps=self.max_steps,
                on_written=functools.partial(_log_report, name),
            )
            for name, network in self.networks.items()
        }

    def _estimate_v0(self) -> dict[str, dict]:
        """Give both second moments the paper's data-driven v0, each from its own network's loss as it is before any step (eq. 10).

        The discriminator's loss is that of pairs of a real and a generated image; the generator's goes through the discriminator,
        whose gradients are not kept.

        Returns:
            The report of each network.
        """
        plan, accelerator, networks = self.plan, self.accelerator, self.networks
        samples = torch.tensor(choose_samples(len(self.pixels), plan.num_samples, plan.seed))
        # With batch norms the gradient of an image depends on its batch: by default they are training's size.
        usual = min(self.args.per_device_train_batch_size, len(samples) // max(2, accelerator.num_processes))
        batches = samples.split(self.args.v0_stats_batch_size or max(1, usual))

        def compute_loss(network: nn.Module, numbers: torch.Tensor) -> torch.Tensor:
            generated = networks["generator"](self.draw(len(numbers)))
            if network is networks["generator"]:
                return compute_generator_loss(networks["discriminator"], generated)
            return compute_discriminator_loss(network, self.take_images(numbers), generated.detach())[0]

        reports = {}
        for name, other in (("generator", "discriminator"), ("discriminator", "generator")):
            report = initialize_v0(
                self.optimizers[name],
                model=self.wrapped[name],
                batches=batches[accelerator.process_index :: accelerator.num_processes],
                loss_fn=compute_loss,
                accelerator=accelerator,
                v0_scale=plan.scale,
                v0_decay_steps=plan.decay_steps,
                v0_include_bias_and_norm=plan.include_bias_and_norm,
                v0_seed=plan.seed,
                effective_batch_size=float(self.batch_size),
                other_modules=[networks[other]],
                max_steps=self.max_steps,
            )
            report.num_samples_requested = plan.num_samples
            reports[name] = report.to_dict()
        return reports

    def _step(self) -> None:
        numbers = choose_images(len(self.pixels), self.batch_size, self.args.seed, self.state.global_step)
        real = self.take_images(numbers.chunk(self.accelerator.num_processes)[self.accelerator.process_index])
        if self.args.v0_record_run:
            self.run_record.record_batches([real])
        self._call("on_step_begin")
        generated = self.wrapped["generator"](self.draw(len(real)))
        loss, *logits = compute_discriminator_loss(self.wrapped["discriminator"], real, generated.detach())
        self._update("discriminator", loss)
        self.networks["discriminator"].requires_grad_(False)
        generator_loss = compute_generator_loss(self.networks["discriminator"], generated)
        self._update("generator", generator_loss)
        self.networks["discriminator"].requires_grad_(True)
        self._sums += torch.stack([loss.detach(), generator_loss.detach(), *(torch.sigmoid(x).mean() for x in logits)])
        self._num_summed += 1
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.steps_per_epoch

    def _update(self, name: str, loss: torch.Tensor) -> None:
        """Make one optimizer step of one network."""
        self.accelerator.backward(loss)
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.networks[name].parameters(), self.args.max_grad_norm)
        self.optimizers[name].step()
        self.schedules[name].step()
        self.optimizers[name].zero_grad()

    def _log_losses(self) -> None:
        means = (self.accelerator.reduce(self._sums, reduction="mean") / self._num_summed).tolist()
        loss, rate = means[0] + means[1], self.schedules["generator"].get_last_lr()[0]
        self._total_loss += loss * self._num_summed
        self._total_steps += self._num_summed
        self._sums, self._num_summed = torch.zeros_like(self._sums), 0
        self._log({"loss": loss} | dict(zip(LOGGED, means, strict=True)) | {"learning_rate": rate})

    def _log(self, figures: dict) -> None:
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
    def reports(self) -> dict[str, dict]:
        """What was done about v0, by network; those missing that are still measured."""
        written = {name: hook.report.to_dict() for name, hook in self.hooks.items() if hook.report is not None}
        return self._saved_reports | written

    def get_v0_report(self) -> dict | None:
        """Return what was done about v0, of both networks, as `v0_init.json` holds it; None before it is done.

        What is the same in both stands once, samples and seconds are summed up, and each whole report is under `networks`.
        """
        reports = self.reports
        if len(reports) < len(self.networks):
            return None
        first, *others = reports.values()
        joined = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        sums = {key: sum(report.get(key) or 0 for report in reports.values()) for key in SUMMED}
        return joined | sums | {"networks": reports}

    def state_dict(self) -> dict:
        """What a checkpoint holds beside networks, optimizers, schedules and random states; accelerate asks for it."""
        return {
            "sums": self._sums.cpu(),
            "num_summed": self._num_summed,
            "reports": self.reports,
            "hooks": {name: hook.state_dict() for name, hook in self.hooks.items() if hook.is_attached},
        }

    def load_state_dict(self, saved: dict) -> None:
        """Take over what `state_dict` returned."""
        self._sums, self._num_summed = saved["sums"].to(self.accelerator.device), saved["num_summed"]
        self._saved_reports = saved["reports"]
        stored = self.get_v0_report()
        changed = [] if stored is None else find_differences(stored, self.plan)
        if stored is None and not saved["hooks"] and self.plan.init != "zeros":
            changed = [f"strategy: zeros -> {self.plan.init}"]
        if changed and self.is_world_process_zero():
            logger.warning(
                f"v0 settings differ from the checkpoint's, whose optimizer state stands, and whose record goes along: {'; '.join(changed)}"
            )
        if saved["hooks"]:
            self.hooks = self._attach_v0()
            for name, state in saved["hooks"].items():
                self.hooks[name].load_state_dict(state)

    def save_checkpoint(self) -> None:
        """Write `checkpoint-N` for step N, marked whole at its end, and delete old ones beyond `save_total_limit`."""
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.is_world_process_zero():
            delete_checkpoint(folder)
            begin_save(folder)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self._save_record(folder)
            complete_save(folder)
            delete_old_checkpoints(self.args.output_dir, self.args.save_total_limit, newest=str(folder))
        self.accelerator.wait_for_everyone()
        self._call("on_save")

    def _save_record(self, folder: Path) -> None:
        report = self.get_v0_report()
        if report is not None:
            write_report(report, folder)
        self.state.save_to_json(str(folder / STATE_FILE))

    def save(self) -> None:
        """Write both networks into folders of their names, each with a card that names its v0, and the state, on the main process."""
        if not self.is_world_process_zero():
            return
        for name, network in self.networks.items():
            folder, report = Path(self.args.output_dir, name), self.reports.get(name)
            network.save_pretrained(folder)
            card = folder / "README.md"
            card.write_text(add_v0_section(card.read_text(encoding="utf-8"), report), encoding="utf-8")
            if report is not None:
                write_report(report, folder)
        self._save_record(Path(self.args.output_dir))

    def load_trained(self) -> None:
        """Load networks, state and v0 record of the output folder's run, which has been trained to its end."""
        folder = Path(self.args.output_dir)
        for name, network in self.networks.items():
            network.load_state_dict(type(network).from_pretrained(folder / name).state_dict())
        self._saved_reports = (read_report(folder) or {}).get("networks", {})
        self._load_state(folder)

    def _load_state(self, folder: str | Path) -> None:
        saved = TrainerState.load_from_json(str(Path(folder, STATE_FILE)))
        for name in ("global_step", "epoch", "log_history"):
            setattr(self.state, name, getattr(saved, name))

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float | str]:
        """Measure generated images and write a grid of 64 of them. The noise is the same at every call; all else is kept.

        Returns:
            On the main process `eval_loss`, the Frechet distance, which is NaN if the images are not finite; the same under the name
            of `ImageQuality` after `eval_`; `eval_runtime` in seconds. Elsewhere an empty dict.
        """
        if self._measured[0] != self.state.global_step:
            metrics = {}
            if self.is_world_process_zero():
                start, generator = time.time(), self.networks["generator"]
                was_training = generator.training
                with torch.random.fork_rng(), torch.no_grad():
                    metrics = self._measure(generator.eval())
                generator.train(was_training)
                metrics |= speed_metrics("eval", start)
            self.accelerator.wait_for_everyone()
            self._measured = (self.state.global_step, metrics)
        return self._measured[1]

    def _measure(self, generator: nn.Module) -> dict[str, float | str]:
        fixed, device = torch.Generator().manual_seed(self.args.seed), self.accelerator.device
        noise = draw_noise(self.num_eval_images, generator.latent_size, fixed)
        images = torch.cat([generator(part.to(device)).cpu() for part in noise.split(GENERATION_BATCH)])
        distance, extractor = math.nan, self.quality.extractor
        if bool(images.isfinite().all()):
            pixels = round_to_pixels(images)
            path = Path(self.args.output_dir, SAMPLES_FOLDER, f"step_{self.state.global_step}.png")
            write_image_grid(pixels[:NUM_SAMPLES], path)
            distance = self.quality.measure(pixels)
        metrics = {"eval_loss": distance, f"eval_{extractor.metric}": distance, "eval_features": extractor.name}
        return metrics | {"eval_samples": len(images)}


# ---- optimizers and schedules ------------------------------------------------------------------------------------------


def make_optimizer(network: nn.Module, training, max_steps: int, decay_steps: int | None = None):
    """Make the optimizer and the schedule of one network: those of a Trainer with these flags.

    Args:
        decay_steps: for how long the schedule stays at its peak, since v0 stands for a warmup of that length; None: as it is.

    Raises:
        InputError: a warmup beside a v0 that stands for it, or an optimizer that the loop here cannot use.
    """
    options = copy.copy(training)
    for setting, field in V0InitArguments.__dataclass_fields__.items():
        if setting != "v0_optimizer":
            setattr(options, setting, field.default)
    options.report_to = []
    options.eval_strategy, options.save_strategy, options.eval_on_start = IntervalStrategy.NO, SaveStrategy.NO, False
    options.output_dir = tempfile.gettempdir()  # a Trainer makes its folder; this one writes nothing
    trainer = V0InitTrainer(model=network, args=options)
    optimizer = trainer.create_optimizer()
    if callable(getattr(optimizer, "train", None)):
        raise InputError(
            f"optimizer {type(optimizer).__name__} keeps two sets of weights, for training and evaluation, which this loop "
            "does not switch; use another, such as adamw_torch"
        )
    trainer.state.max_steps = max_steps
    scheduler = trainer.create_scheduler(max_steps, optimizer)
    what = find_what_warms_up(training, training.resolve(max_steps))
    if what is not None:
        require_no_warmup(what, trainer, scheduler)
    if training.untuned_warmup is not None:
        add_untuned_warmup(scheduler, optimizer, training.untuned_warmup)
    if decay_steps is not None:
        keep_plateau(trainer, scheduler, decay_steps)
    return optimizer, scheduler


def choose_decay_steps(training, max_steps: int) -> int | None:
    """Return for how many steps v0 decays, None if beta2 alone says so; two thirds of training where it would be measured.

    What is measured elsewhere is how far one network may go by one loss.
    """
    steps = training.resolve(max_steps).decay_steps
    if steps != AUTO:
        return steps
    reason = "a GAN has two networks, each with a loss of its own"
    length = choose_length(None, training.learning_rate, max_steps, reason=reason)
    length.log("v0 decays over")
    return length.steps


def _log_report(name: str, report) -> None:
    logger.info(f"of the {name}:")
    report.log()
