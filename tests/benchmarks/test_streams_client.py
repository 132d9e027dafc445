"""What counts of a round of streams: tokens while all of them run."""

import pytest
import streams_client
from streams_client import Progress


def test_tokens_are_counted_from_the_last_streams_first_to_the_first_end(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(streams_client.time, "perf_counter", lambda: now[0])
    progress = Progress(2, began=now[0])
    progress.begun()
    progress.came(5)  # the other one waits
    now[0] = 11.0
    progress.begun()
    assert progress.is_steady
    progress.came(3)
    progress.came(1)
    now[0] = 13.0
    progress.ended()
    progress.came(7)
    now[0] = 14.0
    progress.ended()
    assert progress.result() == (4.0, 0.5)


def test_streams_that_never_ran_all_at_once_are_an_error():
    progress = Progress(2)
    progress.begun()
    with pytest.raises(RuntimeError, match="more tokens"):
        progress.ended()
