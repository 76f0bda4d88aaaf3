"""``gr-prepare CONFIG [--field value ...]``: downloads and prepares the data of a config, and says what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gr.errors import UserError, run_cli
from gr.train import load_config

USAGE = """usage: gr-prepare CONFIG [--field value ...]

  CONFIG            a YAML file, as of gr-train; only its `data` and `cache` are looked at
  --a.b value       overrides field b of part a, for instance --data.path FILE for a file at hand

Downloads go to <cache>/downloads and resume where they stopped; prepared data go to <cache>. gr-train
does the same when it finds no prepared data."""


def main(argv: list[str]) -> int:
    """Returns an exit status: 0 done."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    from gr.data.prepare import ensure_prepared

    config = load_config(argv)
    folder, now = ensure_prepared(config.data, config.cache)
    print(f"{'prepared' if now else 'already prepared'}: {folder}")
    print(describe(read_manifest(folder)))
    return 0


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a prepared folder says of itself.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"prepared data {folder} is incomplete ({error}); delete it and the same command prepares it again"
        ) from None


def describe(manifest: dict[str, Any]) -> str:
    """Lines on a prepared log: counts, repairs, caveats, hash."""
    counts = manifest["counts"]
    lines = [
        f"  source    {manifest['source']}",
        f"  users     {counts['users']:,}",
        f"  items     {counts['items']:,}",
        f"  events    {counts['events']:,}",
    ]
    repairs = [f"{name.replace('_', ' ')} {count:,}" for name, count in manifest["repairs"].items() if count]
    lines.append(f"  repairs   {', '.join(repairs) or 'none needed'}")
    if "input_note" in manifest:
        lines.append(f"  note      {manifest['input_note']}")
    lines += [f"  caveat    {caveat}" for caveat in manifest["caveats"]]
    lines.append(f"  content   {manifest['content_hash']}")
    return "\n".join(lines)


def cli() -> int:
    """Console entry point."""
    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(cli())
