"""The wire: whole messages or a typed error, whatever arrives."""

import contextlib
import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire.outputs import Logprob, OutputDelta
from quire.remote.channel import LENGTH, MAX_FRAME, Channel, ChannelClosed
from quire.remote.messages import Abort, Add, News, ToChild, ToParent, WireSequence


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def news(*deltas):
    from quire.contract.kv import KVStats
    from quire.contract.scheduling import SchedulerStats

    return News(KVStats(9, 8, 1, 1, 3), SchedulerStats(0, 1, 2, 3), list(deltas))


def test_messages_arrive_as_they_were_sent(pair):
    ours, theirs = Channel(pair[0], ToParent), Channel(pair[1], ToChild)
    add = Add(
        "r",
        [1, 2],
        {"logit_bias": {3: 0.5}, "stop": ("x",)},
        1.5,
        [7],
        0,
        "",
        [WireSequence("r#0", 5, 2**64 - 1, None, [4])],
    )
    ours.send(add)
    ours.send(Abort("r"))
    got = theirs.receive()
    assert got.submission().params.logit_bias == {3: 0.5}
    assert got.submission().params.stop == ("x",)
    assert got.submission().sequences[0].seed == 2**64 - 1
    assert theirs.receive() == Abort("r")
    delta = OutputDelta(
        "r", 1, "Grüße", (5, 6), ({5: Logprob(-0.5, 1, "a")}, {6: Logprob(-1.0)}), finish_reason="stop", stop_reason=6
    )
    theirs.send(news(delta))
    assert ours.receive().deltas == [delta]


def test_large_messages_arrive_whole(pair):
    import threading

    ours, theirs = Channel(pair[0], ToParent), Channel(pair[1], ToChild)
    message = Add("r", list(range(500_000)), {}, 0.0, [], 0, "", [])
    sender = threading.Thread(target=ours.send, args=(message,))
    sender.start()
    assert theirs.receive() == message
    sender.join()


def test_silence_is_told_apart_from_the_end(pair):
    channel = Channel(pair[0], ToParent)
    with pytest.raises(TimeoutError):
        channel.receive(0.05)
    pair[1].close()
    with pytest.raises(ChannelClosed, match="closed"):
        channel.receive(0.05)
    with pytest.raises(ChannelClosed):
        channel.send(Abort("x"))


@given(st.binary(max_size=200))
def test_whatever_arrives_is_a_message_or_a_typed_error(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours, ToParent)
        theirs.sendall(LENGTH.pack(len(data)) + data)
        theirs.close()
        with contextlib.suppress(ChannelClosed):
            assert isinstance(channel.receive(1.0), ToParent)


@given(
    st.recursive(
        st.none() | st.integers(-9, 9) | st.text(max_size=3),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["type", "kv", "deltas"]), x),
        max_leaves=9,
    )
)
def test_well_formed_data_of_other_shapes_is_refused(value):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        data = msgspec.msgpack.encode(value)
        theirs.sendall(LENGTH.pack(len(data)) + data)
        with pytest.raises(ChannelClosed, match="no message"):
            Channel(ours, ToParent).receive(1.0)


def test_an_absurd_length_is_refused_at_once(pair):
    pair[1].sendall(LENGTH.pack(MAX_FRAME + 1))
    with pytest.raises(ChannelClosed, match="announced"):
        Channel(pair[0], ToParent).receive(1.0)
