"""Lightning's Trainer, whose optimizers make the gradients inside their step: a callback of four lines gives them a v0."""

import pytest
import torch

from hf_v0init import attach_v0

lightning = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning: pip install pytorch-lightning")

NUM_STEPS, LENGTH = 30, 20


def make_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs = torch.randn(NUM_STEPS, 8, 8, generator=torch.Generator().manual_seed(1))
    return [(x, 2 * x[:, :1]) for x in inputs]


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def training_step(self, batch, number):
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class V0(lightning.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.hook = attach_v0(trainer.optimizers[0], pl_module, v0_decay_steps=LENGTH)


def test_lightnings_trainer_is_the_plain_loop_bit_for_bit(tmp_path):
    module, callback = Regression(), V0()
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_steps=NUM_STEPS,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[callback],
        default_root_dir=tmp_path,
        **off,
    )
    trainer.fit(module, torch.utils.data.DataLoader(make_batches(), batch_size=None))

    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    attach_v0(optimizer, net, v0_decay_steps=LENGTH)
    for inputs, targets in make_batches():
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert callback.hook.report.strategy == "data_driven" and not callback.hook.is_attached
    assert all(torch.equal(a, b) for a, b in zip(module.net.parameters(), net.parameters(), strict=True))
