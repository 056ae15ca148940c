"""One load of a process at a time.

Building and filling a model goes through state that torch and transformers keep for the whole
process: the default dtype, the initialisers, the factories, the random stream. Two loads at once
would build each other's models in mixed dtypes, in silence. So loads of one process take turns;
each waits for the one before it, and says so to the logger ``llmload``.

What cannot be kept apart this way is the caller's own code in other threads. While a load runs, a
tensor that another thread makes without saying its dtype may get the load's, and a load that fails
puts the random stream back to where it was when the load began.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llmload.loading import room

_LOGGER = logging.getLogger("llmload")


class _Turn:
    """The lock that the loads of one process share, and who holds it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.process = os.getpid()
        self.holder = ""


_turn = _Turn()


@contextmanager
def taken(what: str) -> Iterator[None]:
    """Wait until no other thread of this process plans or loads, and keep others out.

    A plugin may load another model from its hook: the thread that has the turn does not wait for
    itself.

    :param what: names the load for the thread that waits for it.
    :raises LoadFailedError: memory ran out within the block.
    """
    turn = _of_this_process()
    if not turn.lock.acquire(blocking=False):
        _LOGGER.info("%s waits for another load of this process: %s", what, turn.holder)
        turn.lock.acquire()
    before, turn.holder = turn.holder, f"{what}, in thread {threading.current_thread().name!r}"
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not room.ran_out(error):
            raise
        raise room.refusal(what, error) from error
    finally:
        turn.holder = before
        turn.lock.release()


def _of_this_process() -> _Turn:
    """Return the lock, a new one in a process that was forked while another thread held it."""
    global _turn
    if _turn.process != os.getpid():
        _turn = _Turn()
    return _turn
