"""The diagnostics callback: its figures against full-size references, and a run that it does not touch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_gpt2
from torch import nn
from trainers import assert_equal_weights, make_trainer, train
from transformers import TrainerCallback

from hf_v0init import InputError, attach_v0, read_second_moment
from hf_v0init.diagnostics.callback import DIAGNOSTICS_FILE, V0DiagnosticsCallback, _is_moment_step, read_diagnostics
from hf_v0init.diagnostics.element_samples import ElementSamples, compute_weighted_quantiles
from hf_v0init.method.multiplier import compute_multiplier

DATA_DRIVEN = {"v0_init": "data_driven", "v0_decay": "beta2"}


class LinearModel(nn.Module):
    """loss = mean over samples of sum(w * x): the gradient is the mean of the batch's x, whatever w is."""

    def __init__(self, shape=(16, 24)):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))

    def forward(self, x, labels=None):
        return {"loss": (x * self.w).sum(dim=(1, 2)).mean()}


def make_linear_data(num: int = 400, shape=(16, 24), mean: float = 0.3):
    generator = torch.Generator().manual_seed(5)
    return [{"x": mean + torch.randn(shape, generator=generator), "labels": torch.tensor(0)} for _ in range(num)]


class Reference(TrainerCallback):
    """Records every weight and second moment, in full."""

    def __init__(self):
        self.updates, self.moments, self.rates = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before = {n: p.detach().clone().double() for n, p in model.named_parameters()}
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.updates.append(torch.cat([(p.detach() - self.before[n]).flatten() for n, p in model.named_parameters()]))
        moments = [read_second_moment(optimizer, p).detach().clone().double() for p in model.parameters()]
        self.moments.append(torch.cat([m.flatten() for m in moments]))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of 12 steps with everything looked at, and the reference's record of it."""
    folder = tmp_path_factory.mktemp("watched")
    callback, reference = V0DiagnosticsCallback(), Reference()
    trainer = make_trainer(
        folder, callbacks=[reference], max_steps=12, learning_rate=1e-3, warmup_steps=3, **DATA_DRIVEN
    )
    callback.attach(trainer)
    trainer.train()
    return trainer, callback, reference, read_diagnostics(folder)


def test_updates_are_those_of_all_weights(watched):
    _, callback, reference, read = watched
    updates = read["updates"]
    assert updates["step"] == list(range(1, 13))
    assert updates["learning_rate"] == pytest.approx(reference.rates)
    count = reference.updates[0].numel()
    assert read["settings"]["num_elements"] == read["settings"]["num_elements_for_updates"] == count
    for i, update in enumerate(reference.updates):
        norm = float(update.norm())
        assert updates["norm"][i] == pytest.approx(norm, rel=1e-5)
        assert updates["rms"][i] == pytest.approx(norm / count**0.5, rel=1e-5)
        if reference.rates[i] > 0:
            assert updates["rms_over_lr"][i] == pytest.approx(norm / count**0.5 / reference.rates[i], rel=1e-5)
    # the first step of a linear warmup has lr = 0: nothing moves and there is no ratio
    assert reference.rates[0] == 0.0 and updates["norm"][0] == 0.0 and updates["rms_over_lr"][0] is None
    assert callback.get_diagnostics()["updates"] == updates


def test_drift_is_that_of_all_second_moments(watched):
    _, _, reference, read = watched
    drift, beta2 = read["second_moment"], 0.999
    assert drift["step"] == [1, 2, 3, 4, 5, 6, 8, 10, 12]
    corrected = {t: reference.moments[t - 1] / (1 - beta2**t) for t in drift["step"]}
    late = corrected[12]
    for i, step in enumerate(drift["step"]):
        assert drift["mean"][i] == pytest.approx(float(corrected[step].mean()), rel=1e-4)
        assert drift["drift"][i] == pytest.approx(float((corrected[step] - late).abs().mean()), rel=1e-3, abs=1e-12)
        nonzero = late > 0
        relative = ((corrected[step] - late).abs() / late)[nonzero].numpy()
        assert drift["relative_drift"][i] == pytest.approx(np.quantile(relative, 0.5), rel=2e-2, abs=1e-9)
    assert drift["drift"][-1] == 0.0


def test_settings_and_cost_are_recorded(watched):
    trainer, _, _, read = watched
    settings = read["settings"]
    assert (settings["optimizer"], settings["v0_init"], settings["beta2"]) == ("AdamW", "data_driven", 0.999)
    assert settings["scale"] == 1.0 and settings["num_tensors_left_out"] == 0
    assert settings["measured_ratio"] == trainer.get_v0_report()["measured_ratio"]
    assert read["cost"]["seconds"] > 0.0 and 0.0 < read["cost"]["share_of_time"] < 1.0


@pytest.fixture(scope="module")
def linear_runs(tmp_path_factory):
    """A linear model trained with v0 and, on the same gradients, without; both watched.

    x has mean 0.3 and variance 1: E[g^2] is 1.09 of a sample, 0.34 of a step of four.
    """
    runs = {}
    for name, options in {
        "with": {
            "v0_init": "data_driven",
            "v0_estimator": "per_sample",
            "v0_scale": 4 * 0.34 / 1.09,
            "v0_num_samples": 400,
        },
        "without": {},
    }.items():
        reference, folder = Reference(), tmp_path_factory.mktemp(name)
        trainer = make_trainer(
            folder,
            model=LinearModel(),
            data=make_linear_data(),
            callbacks=[reference],
            max_steps=100,
            adam_beta2=0.95,
            max_grad_norm=0.0,
            logging_steps=50,
            **options,
        )
        V0DiagnosticsCallback().attach(trainer)
        trainer.train()
        runs[name] = (trainer, reference, read_diagnostics(folder))
    return runs


def test_multiplier_is_the_step_with_v0_against_the_one_without(linear_runs):
    (_, with_v0, read), (_, without, _) = linear_runs["with"], linear_runs["without"]
    multiplier = read["multiplier"]
    assert multiplier["step"][:5] == [1, 2, 3, 4, 5] and multiplier["step"][-1] == 100
    for i, step in enumerate(multiplier["step"]):
        ratio = (without.moments[step - 1] / with_v0.moments[step - 1]).sqrt().numpy()  # the gradients are the same
        for quantile in (0.1, 0.5, 0.9):
            # the lowest that rounding leaves unresolved are left out, which moves the quantiles a little
            assert multiplier[f"quantile_{quantile:g}"][i] == pytest.approx(
                np.quantile(ratio, quantile), rel=0.05, abs=5e-3
            )
    assert max(multiplier["unresolved"]) < 0.02


def test_multiplier_follows_the_closed_form_on_stationary_gradients(linear_runs):
    multiplier, settings = (linear_runs["with"][2][name] for name in ("multiplier", "settings"))
    assert settings["scale"] == 4 * 0.34 / 1.09 and settings["measured_ratio"] == pytest.approx(4.0, rel=0.05)
    for i, step in enumerate(multiplier["step"]):
        assert multiplier["closed_form"][i] == pytest.approx(compute_multiplier(step, settings["scale"], 0.95))
        expected = compute_multiplier(step, settings["measured_ratio"], 0.95)
        assert multiplier["closed_form_of_measured_ratio"][i] == pytest.approx(expected)
        if step >= 20:  # the mean of a few squares is skewed, so its median lies lower
            assert multiplier["quantile_0.5"][i] == pytest.approx(expected, rel=0.08)


def test_run_without_v0_has_no_multiplier(linear_runs):
    read = linear_runs["without"][2]
    assert read["multiplier"] == {} and "scale" not in read["settings"]
    assert read["updates"]["rms_over_lr"][0] == pytest.approx(1.0, rel=1e-3)  # sign descent, PAPER eq. 12 at v0 = 0


def test_under_a_linear_decay_the_closed_form_is_t_over_the_length(tmp_path):
    options = {"v0_init": "data_driven", "v0_decay": "linear", "v0_decay_steps": 4, "v0_estimation_steps": 2}
    callback = V0DiagnosticsCallback()
    train(tmp_path, model=LinearModel(), data=make_linear_data(), callbacks=[callback], max_steps=6, **options)
    read = read_diagnostics(tmp_path)
    assert read["multiplier"] == {"step": [1, 2, 3, 4, 5, 6], "closed_form": [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]}
    assert read["settings"]["decay_steps"] == 4 and read["settings"]["v0_init"] == "data_driven"
    # the first updates are Adam's own times t / L
    assert read["updates"]["rms_over_lr"][0] == pytest.approx(0.25, rel=1e-2)


class RngRecorder(TrainerCallback):
    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, **kwargs):
        self.states.append((torch.get_rng_state(), np.random.get_state()[1].copy()))


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"stock": True},
        DATA_DRIVEN | {"gradient_accumulation_steps": 2},
        {"v0_init": "random", "v0_decay": "beta2", "optim": "rmsprop", "save_strategy": "steps", "save_steps": 3},
        {"stock": True, "optim": "sgd"},
    ],
    ids=["stock", "data_driven", "rmsprop", "sgd"],
)
def test_run_is_bit_for_bit_the_one_without(tmp_path, attached, options):
    recorders = [RngRecorder(), RngRecorder()]
    plain = train(tmp_path / "plain", callbacks=[recorders[0]], **options)
    callback = V0DiagnosticsCallback(max_per_tensor=50)
    watched = make_trainer(tmp_path / "watched", callbacks=[recorders[1]] + ([] if attached else [callback]), **options)
    if attached:
        callback.attach(watched)
    watched.train()
    assert_equal_weights(plain, watched)
    assert read_diagnostics(tmp_path / "watched")["updates"]["step"] == [1, 2, 3, 4, 5]
    for (cpu, numpy), (cpu2, numpy2) in zip(recorders[0].states, recorders[1].states, strict=True):
        assert torch.equal(cpu, cpu2) and np.array_equal(numpy, numpy2)
    for row, row2 in zip(plain.state.log_history[:-1], watched.state.log_history[:-1], strict=True):
        assert row == row2
    for p, q in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        moments = [None, None]
        if options.get("optim") != "sgd":
            moments = [read_second_moment(t.optimizer, x) for t, x in ((plain, p), (watched, q))]
            assert torch.equal(*moments)


def test_optimizer_without_second_moment_still_has_updates(tmp_path):
    train(tmp_path, stock=True, optim="sgd", callbacks=[V0DiagnosticsCallback()])
    read = read_diagnostics(tmp_path)
    assert len(read["updates"]["norm"]) == 5 and min(read["updates"]["norm"]) > 0
    assert read["second_moment"]["step"] == [] and read["multiplier"] == {}


class Tracker(TrainerCallback):
    """Stands where trackers of `report_to` stand."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_trackers_get_the_figures_with_the_loss(tmp_path):
    tracker = Tracker()
    trainer = make_trainer(tmp_path, callbacks=[tracker], logging_steps=2, max_steps=6, **DATA_DRIVEN)
    callback = V0DiagnosticsCallback().attach(trainer)
    trainer.train()
    rows = [logs for logs in tracker.logs if "loss" in logs]
    updates, multiplier = callback.get_diagnostics()["updates"], callback.get_diagnostics()["multiplier"]
    assert [row["v0/update_norm"] for row in rows] == [updates["norm"][i] for i in (1, 3, 5)]
    assert [row["v0/update_rms_over_lr"] for row in rows] == [updates["rms_over_lr"][i] for i in (1, 3, 5)]
    assert [row["v0/multiplier"] for row in rows] == [multiplier["quantile_0.5"][i] for i in (1, 3, 5)]
    assert rows[0]["v0/multiplier_closed_form"] == pytest.approx(compute_multiplier(2, 1.0, 0.999))
    assert not any(name.startswith("v0/") for row in trainer.state.log_history for name in row)


def test_a_resumed_run_leaves_the_record_of_the_start(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3} | DATA_DRIVEN
    train(tmp_path, callbacks=[V0DiagnosticsCallback()], **options)
    first = (tmp_path / DIAGNOSTICS_FILE).read_text()
    callback = V0DiagnosticsCallback()
    resumed = make_trainer(tmp_path, callbacks=[callback], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [path.name for path in tmp_path.glob("v0_diagnostics*")] == [DIAGNOSTICS_FILE]
    assert (tmp_path / DIAGNOSTICS_FILE).read_text() == first
    assert callback.get_diagnostics()["updates"]["step"] == []


def test_watches_no_longer_than_asked(tmp_path):
    callback = V0DiagnosticsCallback(num_update_steps=2)
    train(tmp_path, callbacks=[callback], **DATA_DRIVEN)
    read = read_diagnostics(tmp_path)
    assert read["updates"]["step"] == [1, 2]
    assert read["second_moment"]["step"] == [1, 2, 3, 4, 5]
    assert callback._update_samples is None  # holds on to no memory of the model


def test_a_step_that_overflowed_does_not_count(tmp_path):
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    accelerated = SimpleNamespace(optimizer=optimizer, step_was_skipped=False)  # as accelerate wraps it
    attach_v0(optimizer, None, "first_gradient", v0_scale=2.0)
    args = SimpleNamespace(process_index=0, v0_init="first_gradient", v0_scale=2.0, output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=0, max_steps=3)
    callback = V0DiagnosticsCallback()
    callback.on_train_begin(args, state, None)
    for skipped in (True, False, False):
        callback.on_pre_optimizer_step(args, state, None, optimizer=accelerated)
        accelerated.step_was_skipped = skipped
        parameter.grad = torch.ones(4, 4)
        if not skipped:
            optimizer.step()
        callback.on_optimizer_step(args, state, None, optimizer=accelerated)
        state.global_step += 1
    read = callback.get_diagnostics()
    assert read["updates"]["norm"][0] == 0.0 and min(read["updates"]["norm"][1:]) > 0.0
    assert read["multiplier"]["step"] == read["second_moment"]["step"] == [2, 3]
    # gradients of 1 and v0 = 2: the closed form holds exactly
    expected = [compute_multiplier(taken, 2.0, 0.999) for taken in (1, 2)]
    assert read["multiplier"]["closed_form"] == pytest.approx(expected)
    assert read["multiplier"]["quantile_0.5"] == pytest.approx(expected, rel=1e-3)


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="max_per_tensor=0"):
        V0DiagnosticsCallback(max_per_tensor=0)


def test_damaged_file_is_named(tmp_path):
    assert read_diagnostics(tmp_path) is None
    (tmp_path / DIAGNOSTICS_FILE).write_text('{"updates":')
    with pytest.raises(InputError, match="damaged"):
        read_diagnostics(tmp_path)


def test_moment_steps_are_evenly_spaced_on_a_logarithmic_scale():
    steps = [step for step in range(1, 1001) if _is_moment_step(step)]
    assert steps[:12] == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25] and steps[-2:] == [794, 1000]
    assert steps == sorted({round(10 ** (p / 10)) for p in range(31)})


# ---- the elements looked at -------------------------------------------------------------------------------------------


def make_parameters(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(300, 64), (64,), (), (8, 4, 3, 3)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    parameters.append(
        nn.Parameter(torch.randn(8, 4, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last))
    )
    parameters.append(nn.Parameter(torch.randn(50, 70, generator=generator).t()))
    return parameters


def test_all_columns_have_their_turn_and_no_copy_is_made():
    parameters = make_parameters()
    samples = ElementSamples(torch.optim.AdamW(parameters), max_per_tensor=1000)
    assert samples.num_left_out == 0 and samples.num_elements == sum(p.numel() for p in parameters)
    weight = parameters[0]
    weight.data.copy_(torch.arange(64.0).expand(300, 64))  # each element holds its column
    first = next(iter(samples._devices.values())).sampled[0]
    assert first.spacing == 21 and first.count == 915  # 20 would divide 64 four times
    values = samples.read_parameters()[0][: first.count]
    assert set(values.tolist()) == set(range(64))
    assert first.view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert samples.weights.sum() == pytest.approx(samples.num_elements, rel=1e-6)


def test_sums_over_sampled_elements_estimate_those_over_all():
    parameters = make_parameters()
    optimizer = torch.optim.AdamW([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.01}])
    cases = [(ElementSamples(optimizer, 100_000), 1e-5), (ElementSamples(optimizer, 500), 0.2)]
    readings = [samples.read_parameters() for samples, _ in cases]
    before = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        changes = [float((p - old).square().sum()) for p, old in zip(parameters, before, strict=True)]
    expected = [sum(changes[:2]), sum(changes[2:])]
    for (samples, tolerance), reading in zip(cases, readings, strict=True):
        sums = samples.sum_squares(reading, samples.read_parameters())[0]
        assert sums.tolist() == pytest.approx(expected, rel=tolerance)
    few = ElementSamples(optimizer, max_total=100)
    assert few.num_looked_at <= 16 * len(parameters) and few.num_elements == cases[0][0].num_looked_at


def test_second_moments_belong_to_the_same_elements():
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters)
    samples = ElementSamples(optimizer, max_per_tensor=400)
    assert not samples.read_second_moments().any()
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    values = samples.read_parameters()[0].double().numpy()
    optimizer.step()
    assert samples.read_second_moments() == pytest.approx(0.001 * values**2, rel=1e-5)


def test_view_follows_a_parameter_to_other_memory():
    parameter = nn.Parameter(torch.zeros(4, 4))
    samples = ElementSamples(torch.optim.AdamW([parameter]))
    assert not samples.read_parameters()[0].any()
    parameter.data = torch.ones(4, 4)
    assert samples.read_parameters()[0].tolist() == [1.0] * 16


def test_weighted_quantiles_are_those_of_repeated_values():
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 5.0, 4.0])
    assert compute_weighted_quantiles(values, weights, (0.1, 0.5, 0.6, 0.95)) == [1.0, 1.0, 2.0, 3.0]
    assert math.isnan(compute_weighted_quantiles(np.array([]), np.array([]), (0.5,))[0])


def test_low_precision_weights_are_read_exactly(tmp_path):
    callback = V0DiagnosticsCallback()
    train(tmp_path, model=make_gpt2().bfloat16(), callbacks=[callback], max_steps=2, **DATA_DRIVEN)
    read = read_diagnostics(tmp_path)
    # bf16 state resolves no multiplier of v0 at the first step: what is left of v is within its rounding
    assert read["updates"]["norm"][0] > 0 and read["multiplier"]["unresolved"][0] > 0.5
