"""What ranks tell each other, without ranks."""

from __future__ import annotations

import json
from datetime import timedelta

import torch.distributed as dist

from llmload.ranks.notices import Notices


def notices() -> list[Notices]:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=2))  # what would be waited for never comes
    return [Notices(store, rank, 3, 5.0) for rank in range(3)]


def test_failure_that_is_numbered_and_not_written_yet_is_not_waited_for() -> None:
    zero, one, two = notices()
    assert zero.store.add("failures", 1) == 1
    assert one.failure() is None
    two.announce(2, "ValueError: late")
    assert one.failure() == "rank 2 failed: ValueError: late"
    zero.store.set("failure/1", json.dumps({"rank": 0, "reason": "OSError: first"}))
    assert one.failure() == "rank 0 failed: OSError: first"


def test_rank_that_failed_waits_until_all_others_know() -> None:
    zero, one, two = notices()
    one.announce(1, "OSError: the disk is on fire")
    one.linger(0.1)
    assert one.failure() == zero.failure() == two.failure()
    assert one.store.add("told", 0) == 2
