"""A model and a loader that train in milliseconds; shared by the tests of training and distributed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from gr.data.batch import JaggedBatch, Labels
from gr.distributed.process import ProcessContext
from gr.losses import Losses
from gr.training.config import OptimizerConfig, TrainConfig
from gr.training.phase import Phase
from gr.training.trainer import Trainer

NUM_ITEMS = 23


class TinyModel(nn.Module):
    """Predicts the next item from the current one."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(NUM_ITEMS, 8)
        self.linear = nn.Linear(8, NUM_ITEMS)
        self.dropout = nn.Dropout(dropout)

    def table_parameters(self) -> list[nn.Parameter]:
        return [self.table.weight]

    def step_cost(self, batch: JaggedBatch) -> SimpleNamespace:
        # Beyond 2**63 within a few steps: counts must be exact all the same.
        return SimpleNamespace(tokens=batch.num_tokens, pairs=3 * batch.num_tokens, forward_flops=2**62 + 1)

    def forward(self, batch: JaggedBatch) -> Losses:
        vectors = self.dropout(self.table(batch.tokens["item_id"][batch.labels.position]))
        losses = nn.functional.cross_entropy(self.linear(vectors).float(), batch.labels.item_id, reduction="none")
        total = (losses * batch.labels.weight).sum()
        return Losses(total=total, parts={"next_item": total.detach()}, weight=batch.labels.weight.sum())


@dataclass
class TinyLoader:
    """``users`` sequences of keyed lengths in batches of ``batch_size``; rank r takes every world-th of a
    batch.

    ``event`` is called with (epoch, index) before a batch is made: tests raise, kill or signal there.
    """

    users: int = 32
    batch_size: int = 4
    rank: int = 0
    world: int = 1
    event: object = None

    def num_batches(self, epoch: int) -> int:
        return -(-self.users // self.batch_size)

    def batch(self, epoch: int, index: int, step: int) -> JaggedBatch:
        if self.event is not None:
            self.event(epoch, index)
        order = torch.randperm(self.users, generator=torch.Generator().manual_seed(epoch))
        users = order[index * self.batch_size : (index + 1) * self.batch_size][self.rank :: self.world]
        rows = []
        for user in users.tolist():
            generator = torch.Generator().manual_seed(user)
            length = 2 + user % 5
            rows.append(torch.randint(NUM_ITEMS, (length + 1,), generator=generator))
        lengths = torch.tensor([0, *(len(row) - 1 for row in rows)])
        items, targets = torch.cat([row[:-1] for row in rows]), torch.cat([row[1:] for row in rows])
        weight = 0.5 + (targets % 3).float()
        return JaggedBatch(
            offsets=lengths.cumsum(0),
            max_seq_len=int(lengths.max()),
            num_tokens=len(items),
            tokens={"item_id": items},
            rows={"sample_key": users},
            index={},
            labels=Labels(torch.arange(len(items)), targets, weight),
        )


def tiny_config(**changes) -> TrainConfig:
    """Three epochs with everything in use; no TensorBoard, whose import costs more than the training."""
    defaults = dict(
        epochs=3,
        optimizer=OptimizerConfig(lr=0.05, weight_decay=0.01, table_lr_factor=0.5),
        clip_norm=0.5,
        log_every_steps=2,
        tensorboard=False,
    )
    return TrainConfig(**{**defaults, **changes})


def tiny_trainer(folder, config=None, *, model=None, loader=None, evaluate=None, phases=None, ctx=None, seed=5):
    """A trainer of a fresh tiny model."""
    return Trainer(
        model or TinyModel(),
        phases or [Phase()],
        loader or TinyLoader(),
        evaluate,
        config or tiny_config(),
        ctx or ProcessContext(),
        folder,
        seed,
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
