"""An encoder of a user's own whose process is killed once, at a chosen step on rank 1: the accident that tests need."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from gr.modules.hstu import HSTU, HSTUConfig


class KillingHSTU(HSTU):
    """HSTU; where KILL_MARK names a file that is not there, step KILL_AT on rank 1 makes it and is the last."""

    @dataclass(frozen=True)
    class Config(HSTUConfig):
        """As HSTU's."""

        kind: str = "killing:KillingHSTU"

    steps = 0

    def forward(self, x, batch):
        if self.training:
            self.steps += 1
            mark = os.environ.get("KILL_MARK")
            here = mark and self.steps == int(os.environ["KILL_AT"]) and os.environ["RANK"] == "1"
            if here and not Path(mark).exists():
                Path(mark).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, batch)
