"""Where logs come from: ``data:`` in a config names one of these."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from gr.config import Registry
from gr.data.amazon import Amazon, AmazonConfig
from gr.data.movielens import MovieLens, MovieLensConfig
from gr.data.planted import Planted, PlantedConfig
from gr.data.table import Table, TableConfig


class Source(Protocol):
    """What a builder in SOURCES returns.

    A source may also have ``fingerprint() -> str``, which changes when its input does (a hash of the file it
    reads), and, if it downloads, ``locate(downloads: Path) -> None``, which is called first and says where to.
    """

    def prepare(self, folder: str | Path) -> None:
        """Writes a store into ``folder`` (``gr.data.store.write_store``)."""
        ...


SOURCES: Registry = {
    "planted": (PlantedConfig, Planted),
    "table": (TableConfig, Table),
    "movielens": (MovieLensConfig, MovieLens),
    "amazon": (AmazonConfig, Amazon),
}
