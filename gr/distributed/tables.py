"""Embedding tables divided among ranks by torchrec, behind the interface of ``gr.embedding.local.LocalTables``.

Rows learn while gradients arrive: fbgemm's fused kernels apply SGD, Adagrad or row-wise Adagrad to the rows of a step
once, all their gradients summed. torchrec divides gradients by the number of ranks, as data parallelism does for the
dense parameters, so one rule serves both: the loss is multiplied by ``world`` over the global weight before its
backward pass.

Every method but ``set_lr_factor`` and ``update`` is a collective: all ranks call it, with ids and queries of their own.
torchrec is imported here alone, and only when tables are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gr.distributed.exchange import Everybody
from gr.distributed.plan import TablePlan, plan_tables, slice_of
from gr.distributed.process import ProcessContext
from gr.distributed.softmax import sharded_softmax_loss
from gr.embedding.config import TablesConfig
from gr.embedding.draw import BLOCK_ROWS, draw
from gr.embedding.local import LocalTables, Transform
from gr.embedding.spec import TableSpec
from gr.errors import UserError

if TYPE_CHECKING:
    from torchrec.distributed.embedding import ShardedEmbeddingCollection


def make_tables(config: TablesConfig, ctx: ProcessContext) -> Callable[[tuple[TableSpec, ...]], nn.Module]:
    """What ``RetrievalModel`` makes its tables with. One process alone has nothing to divide: its tables are local."""

    def make(specs: tuple[TableSpec, ...]) -> nn.Module:
        if config.kind == "sharded" and ctx.world > 1:
            return ShardedTables(specs, config, ctx)
        return LocalTables(specs, config)

    return make


class ShardedTables(nn.Module):
    """Tables divided among the ranks of ``ctx``.

    Args:
        specs: The tables, all of one width.
        config: How they are divided and learn.
        ctx: The processes.

    Raises:
        UserError: torchrec is not installed, or a plan that so many ranks cannot have.
    """

    sharded = True
    own_optimizer = True

    def __init__(self, specs: tuple[TableSpec, ...], config: TablesConfig, ctx: ProcessContext) -> None:
        super().__init__()
        assert ctx.world > 1 and config.own_optimizer
        self.config, self.ctx = config, ctx
        self.specs = {spec.name: spec for spec in specs}
        self.plans = {plan.spec.name: plan for plan in plan_tables(specs, config, ctx.world)}
        with torch.random.fork_rng(devices=[]):  # torchrec draws rows of its own, which are not kept
            collection = _collection(list(self.plans.values()), config, ctx)
        # Held where nn.Module does not look: its parameters are views, some no leaves, that others must not touch.
        self._held = (collection,)
        self._optimizer = collection.fused_optimizer
        # Stands for them: whoever freezes parameters freezes the tables.
        self.learns = nn.Parameter(torch.empty(0))
        self._own_rows: dict[str, Tensor] = {}
        with torch.no_grad():
            weights = self._weights()
            for spec in specs:
                rows = draw(spec)
                for shard in weights[spec.name].local_shards():
                    (row, col), (num_rows, num_cols) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                    for lo, hi in _blocks(row, row + num_rows):  # a shard in float32 may be larger than memory
                        shard.tensor[lo - row : hi - row].copy_(rows(lo, hi)[:, col : col + num_cols])

    @property
    def num_parameters(self) -> int:
        """Numbers in all tables, over all processes."""
        return sum(spec.num_rows * spec.dim for spec in self.specs.values())

    def forward(self, ids: Mapping[str, Tensor], full_softmax: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Vectors of ids: table name -> int64 ids of any shape (...,) gives (..., dim) float32.

        Args:
            ids: What this rank wants of every table; it may be nothing.
            full_softmax: Tables of which ``full_softmax`` will be asked. The ids that this rank scores are looked up
                in the same pass, so that each row learns from all its gradients at once.
        """
        assert set(ids) == set(self.specs), f"asked for {sorted(ids)}; there is {sorted(self.specs)}"
        flat = {name: rows.reshape(-1) for name, rows in ids.items()}
        for name in full_softmax:
            own = torch.arange(*self._own_ids(name), device=flat[name].device)
            flat[name] = torch.cat([flat[name], own])
        flat = {name: self.specs[name].rows_of(wanted) for name, wanted in flat.items()}
        vectors = self._look_up(flat)
        found = {}
        for name, rows in ids.items():
            found[name] = vectors[name][: rows.numel()].view(*rows.shape, self.specs[name].dim)
            if name in full_softmax:
                self._own_rows[name] = vectors[name][rows.numel() :]
        return found

    def _look_up(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Vectors (n, dim) of rows (n,) of every table."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        names = list(self.specs)
        lengths = torch.tensor([rows[name].numel() for name in names], device=rows[names[0]].device)
        request = KeyedJaggedTensor(keys=names, values=torch.cat([rows[name] for name in names]), lengths=lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns.requires_grad):
            answer = self._held[0](request)
            return {name: answer[name].values() for name in names}

    def full_softmax(self, query: Tensor, table: str, target: Tensor, weight: Tensor, transform: Transform) -> Tensor:
        """() weighted sum of the cross-entropies of this rank's targets (S,) among all ids' transformed vectors."""
        rows = self._own_rows.pop(table)  # of this step's look-up
        return sharded_softmax_loss(query, transform(rows).to(query.dtype), self._own_ids(table)[0], target, weight)

    def own_range(self, table: str) -> tuple[int, int]:
        """(lo, hi) rows that this rank scores: an equal share, and those it holds where a table is divided by rows."""
        return slice_of(self.specs[table].num_rows, self.ctx.world, self.ctx.rank)

    def _own_ids(self, table: str) -> tuple[int, int]:
        """(lo, hi) ids of which this rank computes the full softmax; its own rows, unless ids are hashed."""
        return slice_of(self.specs[table].num_ids, self.ctx.world, self.ctx.rank)

    @torch.no_grad()
    def own_vectors(self, table: str) -> Tensor:
        """(hi - lo, dim) rows ``own_range``: as they lie here where the table is divided by rows, else fetched."""
        lo, hi = self.own_range(table)
        if self.plans[table].sharding == "row_wise":
            return self._weights()[table].local_shards()[0].tensor.float()
        nothing = torch.empty(0, dtype=torch.int64, device=self.ctx.device)
        rows = dict.fromkeys(self.specs, nothing) | {table: torch.arange(lo, hi, device=self.ctx.device)}
        return self._look_up(rows)[table]

    @torch.no_grad()
    def logits(self, query: Tensor, table: str, item_range: tuple[int, int], transform: Transform) -> Tensor:
        """(S, hi - lo) inner products of this rank's queries (S, dim) with the vectors, transformed, of ids lo..hi-1.

        Every rank asks for the same ids, with queries of its own. Each scores everybody's queries against its rows
        and sends the numbers back: a rank receives S (hi - lo) of them at most, and the queries of all. No gradient.
        """
        spec = self.specs[table]
        everybody = Everybody.of(query.shape[0], query.device)
        wanted, place = spec.distinct_rows(*item_range)
        ends = [slice_of(spec.num_rows, self.ctx.world, rank)[1] for rank in range(self.ctx.world)]
        counts = torch.searchsorted(wanted, torch.tensor(ends)).diff(prepend=torch.zeros(1, dtype=torch.int64))
        mine = wanted.split(counts.tolist())[self.ctx.rank].to(query.device) - self.own_range(table)[0]
        rows = transform(self.own_vectors(table)[mine]).to(query.dtype)
        scores = everybody.give_back(everybody.gather(query) @ rows.T, counts.tolist())
        return scores if place is None else scores[:, place.to(query.device)]

    @torch.no_grad()
    def iter_vectors(self, table: str, block: int = 65_536) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, (rows, dim) vectors) over a whole table: every rank receives all of it, a block at a time.

        A generator of collectives: all ranks must run it to its end.
        """
        own, spec = self.own_vectors(table), self.specs[table]
        for rank in range(self.ctx.world):
            lo, hi = slice_of(spec.num_rows, self.ctx.world, rank)
            for start in range(lo, hi, block):
                stop = min(start + block, hi)
                rows = own.new_empty(stop - start, spec.dim)
                if rank == self.ctx.rank:
                    rows.copy_(own[start - lo : stop - lo])
                dist.broadcast(rows, rank)
                yield start, rows

    # The optimizer ------------------------------------------------------------------------------------------

    def set_lr_factor(self, factor: float) -> None:
        """The schedule's factor for the coming step; call it before the gradients are made."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor
        self._optimizer.step()  # only hands the rate to the kernels

    def update(self) -> None:
        """Nothing: the rows learned while their gradients arrived."""

    def saved(self, sums: bool = True) -> dict[str, Any]:
        """What a checkpoint holds of the tables, as sharded tensors over the tables' own memory.

        ``<table>/rows``, and ``<table>/sums`` where they are wanted and are. Clone the shards before writing them while
        training goes on.
        """
        found: dict[str, Any] = {f"{name}/rows": weight for name, weight in self._weights().items()}
        if sums and self.config.optimizer.kind != "sgd":
            for states in self._optimizer.state_dict()["state"].values():
                for key, value in states.items():
                    name, _, what = key.rpartition(".")
                    assert what == "momentum1", key
                    found[f"{name}/sums"] = value
        return found

    def restored(self, saved: Mapping[str, Any]) -> None:
        """Nothing: what was read into the tensors of ``saved()`` went to its place."""

    def _weights(self) -> dict[str, Any]:
        weights = self._held[0].state_dict()
        return {name: weights[f"embeddings.{name}.weight"] for name in self.specs}


def _blocks(lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """Spans of rows that are drawn together; none draws a generator's block twice."""
    while lo < hi:
        stop = min(hi, (lo // BLOCK_ROWS + 1) * BLOCK_ROWS)
        yield lo, stop
        lo = stop


def _collection(plans: list[TablePlan], config: TablesConfig, ctx: ProcessContext) -> ShardedEmbeddingCollection:
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingEnv, ShardMetadata
        from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
        from torchrec.modules.embedding_modules import EmbeddingCollection
    except ImportError as error:
        raise UserError(
            f"distributed.tables.kind is 'sharded', which needs torchrec and fbgemm ({error}); "
            "run make setup, or set it to local"
        ) from None
    dtype = {"fp32": DataType.FP32, "fp16": DataType.FP16}[config.rows]
    module = EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                name=plan.spec.name,
                num_embeddings=plan.spec.num_rows,
                embedding_dim=plan.spec.dim,
                feature_names=[plan.spec.name],
                data_type=dtype,
            )
            for plan in plans
        ],
    )
    kernel = ctx.device.type

    def sharding(plan: TablePlan) -> ParameterSharding:
        shards = [
            ShardMetadata([s.row, s.col], [s.rows, s.cols], f"rank:{s.rank}/{_place(kernel, s.rank)}")
            for s in plan.shards
        ]
        ranks = [s.rank for s in plan.shards]
        return ParameterSharding(plan.sharding, "fused", ranks, EnumerableShardingSpec(shards))

    fused = {
        "optimizer": EmbOptimType[f"EXACT_{config.optimizer.kind.upper()}"],
        "learning_rate": config.optimizer.lr,
        "eps": config.optimizer.eps,
        "stochastic_rounding": False,  # so that fp16 rows are those of the local tables
    }
    return EmbeddingCollectionSharder(fused_params=fused).shard(
        module,
        {plan.spec.name: sharding(plan) for plan in plans},
        ShardingEnv.from_process_group(dist.group.WORLD),
        ctx.device,
    )


def _place(kind: str, rank: int) -> str:
    return "cpu" if kind == "cpu" else f"cuda:{rank % max(1, torch.cuda.device_count())}"
