"""One state at a time goes to disk, in the background if asked to; training waits for a copy in memory only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gr.distributed.host_copy import HostBuffers
from gr.distributed.process import ProcessContext, is_lost
from gr.errors import UserError

Write = Callable[[Any, ProcessContext], None]


class Saver:
    """Hands states to functions that write them. All ranks call every method at the same step.

    In the background a state is copied to host memory, which is kept for the next one, and a thread writes the copy;
    what its ranks have to agree on goes over a group of their own. A second state waits until the first is written.
    Errors of the thread come out of the next ``submit`` or ``wait``; ``failed`` tells that there is one.

    While entered, states may be submitted; leaving waits for the last, unless other processes are gone.

    Args:
        ctx: The processes.
        background: Whether ``submit`` returns before the state is written.
    """

    def __init__(self, ctx: ProcessContext, background: bool) -> None:
        self._ctx = ctx
        self._background = background
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.wait()
            elif not is_lost(error) and self._thread is not None:
                self._thread.join()  # groups may end once this returns; the error on its way tells enough
        finally:
            self._thread, self._error, self._buffers = None, None, HostBuffers()

    @property
    def failed(self) -> bool:
        """Whether this rank's thread has met an error that nobody has heard of yet."""
        return self._error is not None

    def submit(self, state: Any, write: Write) -> None:
        """Has ``write(state, ctx)`` called, with the values that the state has now.

        Args:
            state: Nested dicts and lists of tensors and plain data, of which ``write`` alone knows the meaning.
            write: A collective over the ``ctx`` that it is given. Its last act must be that all ranks agree on how it
                went, so that they fail together or not at all.

        Raises:
            UserError: On every rank: this state (or, in the background, the one before) could not be written.
        """
        self.wait()
        if not self._background:
            write(state, self._ctx)
            return
        ctx = self._ctx.in_background()  # not kept: a group's threads live as long as something refers to it
        copy = self._buffers.copy(state, ctx)
        self._thread = threading.Thread(target=self._run, args=(copy, write, ctx), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last state is written.

        Raises:
            UserError: On every rank: it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, state: Any, write: Write, ctx: ProcessContext) -> None:
        try:
            write(state, ctx)
        except UserError as error:
            self._error = UserError(str(error))  # without the frames, in which groups would live on
        except BaseException as error:
            self._error = error
