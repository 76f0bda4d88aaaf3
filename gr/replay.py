"""``gr-replay FILE``: computes a step that diverged again, from the batch and the weights that training kept of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from gr.errors import Parser, UserError, run_cli

USAGE = """Computes the step again that ended a training, with its own batch, dropout and weights, and prints the loss
and the norm of its gradient for each micro-batch. FILE is runs/<name>/diverged/step-N/rank-R.pt.

In Python: gr.replay.replay_file(FILE) returns the numbers; gr.training.guard.load_evidence(FILE) the batch."""


def main(argv: list[str]) -> int:
    """Returns 0 whatever the numbers are: they are the answer."""
    parser = Parser("gr-replay", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="rank-R.pt of a step")
    parser.add_argument("--cache", help="folder of prepared data; as in the run's config by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_args(argv)
    from gr.training.guard import load_evidence

    found = load_evidence(arguments.file)
    print(
        f"step {found.context.step + 1}, epoch {found.context.epoch + 1}, loader batch {found.index}, seed "
        f"{found.context.seed}, rank {found.rank} of {found.world}: loss {found.loss}, gradient norm {found.grad_norm}"
    )
    seen = replay_file(arguments.file, arguments.cache, arguments.device)
    for batch, (loss, norm) in zip(found.batches, seen, strict=True):
        print(f"again: loss {loss}, gradient norm {norm} ({batch.num_sequences} users, {batch.num_tokens} tokens)")
    return 0


def replay_file(path: str | Path, cache: str | None = None, device: str = "cpu") -> list[tuple[float, float]]:
    """(mean loss, norm of its gradient) of each micro-batch in a ``rank-R.pt`` that ``gr-train`` left behind.

    Args:
        path: The file, in its place in the run folder.
        cache: Folder of prepared data; ``None``: as in the run's config.
        device: Where the model runs.

    Raises:
        UserError: Missing or damaged files, or a folder that has since been given to another config.
    """
    from gr.config import config_hash
    from gr.inference.load import load_config, open_log
    from gr.training.assemble import assemble
    from gr.training.guard import WEIGHTS, load_evidence, replay
    from gr.training.phase import Phase
    from gr.training.run_folder import RunFolder
    from gr.training.weights import load_weights

    path = Path(path)
    found = load_evidence(path)
    folder = RunFolder(path.resolve().parents[2])
    config = load_config(folder)
    if config_hash(config) != found.config_hash:
        raise UserError(
            f"{path} is of config {found.config_hash}, run folder {folder.path} holds {config_hash(config)}; "
            "keep the file in the folder of its run"
        )
    store, split = open_log(folder, config, cache)
    model = assemble(config, store, split)
    load_weights(model, path.with_name(WEIGHTS))
    return replay(model.to(device).train(), Phase(), found.batches, found.context, found.rank, found.bf16)


def cli() -> int:
    """Console entry point."""
    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(cli())
