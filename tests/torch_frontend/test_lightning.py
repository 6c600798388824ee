"""A Lightning Trainer: closures, clipping, accumulation, mixed precision, and resuming."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from watched import STEPS, check_trained, layers

from singd_torch import SINGD

lightning = pytest.importorskip("lightning")
pytestmark = [
    # 32 rows need no worker processes
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # how lightning asks torch for a leaf of a tree
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),
]


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = SINGD(self, lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batch: int = 32) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=draw), torch.randint(3, (32,), generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def fit(
    module: Module,
    folder: Path,
    steps: int = STEPS,
    *,
    batch: int = 32,
    resume_from: Path | None = None,
    **given: Any,
) -> Any:
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **given,
    )  # fmt: skip
    trainer.fit(module, loader(batch), ckpt_path=resume_from)
    return trainer


HOW: dict[str, dict[str, Any]] = {
    "plainly": {},
    "with clipping": {"gradient_clip_val": 0.5},
    "in bfloat16 autocast": {"precision": "bf16-mixed"},
    "in bfloat16 autocast with clipping": {"precision": "bf16-mixed", "gradient_clip_val": 0.5},
}


@pytest.mark.parametrize("how", HOW)
def test_a_lightning_trainer_trains(how: str, tmp_path: Path) -> None:
    module = Module()
    start = copy.deepcopy(module)
    trainer = fit(module, tmp_path, **HOW[how])
    (optimizer,) = trainer.optimizers
    assert [layer.name for layer in layers(optimizer)] == ["net.0.weight", "net.3.weight"]
    check_trained(module, start, optimizer, module.losses)


def test_batches_that_lightning_accumulates_are_one_large_batch(tmp_path: Path) -> None:
    module = Module()
    whole = copy.deepcopy(module)
    fit(module, tmp_path, 4, batch=8, accumulate_grad_batches=4)
    fit(whole, tmp_path, 4)
    for p, q in zip(module.parameters(), whole.parameters(), strict=True):
        # the rounding of float32, through four steps
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [None, 0.05])
def test_lightning_scales_and_clips_as_a_loop_of_torch(most: float | None, tmp_path: Path) -> None:
    module = Module()
    by_hand = copy.deepcopy(module)
    # a scaler of CPUs, which a trainer makes for GPUs alone
    precision = lightning.pytorch.plugins.MixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0)
    )
    fit(module, tmp_path, 6, plugins=[precision], gradient_clip_val=most)

    optimizer, scaler = SINGD(by_hand, lr=0.05), torch.amp.GradScaler("cpu", init_scale=1024.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    (batch,) = loader()
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = by_hand.training_step(batch, 0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if most is not None:
            nn.utils.clip_grad_norm_(by_hand.parameters(), most)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    assert all(map(torch.equal, module.parameters(), by_hand.parameters()))


def test_a_run_resumed_from_a_lightning_checkpoint_is_the_uninterrupted_one(tmp_path: Path) -> None:
    module, resumed = Module(), Module()
    first, file = copy.deepcopy(module), tmp_path / "half.ckpt"
    fit(module, tmp_path)
    fit(first, tmp_path, STEPS - 8).save_checkpoint(file)
    trainer = fit(resumed, tmp_path, resume_from=file)
    assert trainer.global_step == STEPS
    assert len(resumed.losses) == 8
    for p, q in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
