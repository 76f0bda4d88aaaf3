"""How a run is spread over processes, beyond what the launcher decides."""

from __future__ import annotations

from dataclasses import dataclass

from gr.embedding.config import TablesConfig


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Attributes:
    tables: Embedding tables: local or sharded, and how they learn.
    """

    tables: TablesConfig = TablesConfig()
