"""Peers that decode a few steps each in turn."""

import sys
import textwrap

import pytest
from cpu_peers import models, turns
from cpu_peers.beside import Beside, Turn, in_turn, table
from cpu_peers.environments import SOURCES, surroundings
from cpu_peers.protocol import MARK, Request, Unavailable
from cpu_peers.workload import Point

REQUEST = Request("measure", "checkpoint", "folder", "bf16", ("decode:2:5", "decode:2:60"), 1)


class Ticking:
    """One token per request and step, each of which takes a quarter of a second of a clock that only this moves."""

    vocab, skips = 100, {}

    def __init__(self):
        self.left, self.now, self.added = {}, 0.0, []

    def add(self, key, prompt, count):
        self.left[key] = count
        self.added.append((len(prompt), count))

    def step(self):
        self.now += 0.25
        deltas = [(key, [7]) for key in self.left]
        self.left = {key: count - 1 for key, count in self.left.items() if count > 1}
        return deltas

    def busy(self):
        return bool(self.left)


def test_a_window_counts_the_tokens_of_its_steps(monkeypatch):
    engine = Ticking()
    monkeypatch.setattr("cpu_peers.turns.time.perf_counter", lambda: engine.now)
    turns.started(engine, Point("decode", 3, 5), 30, 0)
    assert engine.added == [(5, 30)] * 3
    begun = engine.now
    assert turns.rate(engine, 4) == 3 / 0.25
    assert engine.now == begun + 4 * 0.25
    with pytest.raises(ValueError, match="have ended"):
        turns.rate(engine, 30 - turns.WARM_UP - 1 - 4)


def peer(tmp_path, body):
    """A program that is asked as a peer is."""
    script = tmp_path / "peer.py"
    script.write_text(f"import sys, json\nMARK = {MARK!r}\nrequest = sys.stdin.readline()\n" + textwrap.dedent(body))
    return [sys.executable, str(script)]


def test_a_peer_answers_line_by_line_beside_what_libraries_print(tmp_path):
    command = peer(
        tmp_path,
        """
        print("loading"); print(MARK + json.dumps(json.loads(request)), flush=True)
        for line in sys.stdin:
            print("noise"); print(MARK + json.dumps(10.0 * int(line)), flush=True)
        """,
    )
    turn = Turn(command, REQUEST, {}, tmp_path)
    try:
        assert turn.notes["points"] == ["decode:2:5", "decode:2:60"]
        assert [turn.rate(steps) for steps in (3, 8)] == [30.0, 80.0]
    finally:
        turn.close()


def test_a_peer_that_ends_has_its_last_words_told(tmp_path):
    with pytest.raises(Unavailable, match="ended: RuntimeError: no such model"):
        Turn(peer(tmp_path, "raise RuntimeError('no such model')"), REQUEST, {}, tmp_path)


class Scripted:
    """A turn with these rates."""

    def __init__(self, name, rates, order):
        self.name, self.rates, self.order = name, iter(rates), order

    def rate(self, steps):
        self.order.append((self.name, steps))
        return next(self.rates)


def test_windows_alternate_and_ratios_are_of_neighbours():
    """The memory's speed halves after the second window, for both; the ratio stays what it is."""
    order = []
    rates = in_turn(
        {
            "quire": Scripted("quire", [1, 40, 44, 20, 22], order),
            "other": Scripted("other", [9, 20, 22, 10, 11], order),
        },
        4,
        8,
    )
    assert order == [("quire", 8), ("other", 8)] * 5
    assert rates == {"quire": [40, 44, 20, 22], "other": [20, 22, 10, 11]}
    beside = Beside("model, bf16", "decode:1:64", rates)
    assert beside.ratios("other") == [2.0] * 4
    assert table([beside]).splitlines() == [
        "| tokens/s | quire | other | quire / other |",
        "|---|---:|---:|---:|",
        "| model, bf16, decode:1:64 | 31.0 | 15.5 | 2.00 (2.00 to 2.00) |",
    ]


def test_a_peer_of_the_tiny_model_decodes_in_turn(tmp_path):
    """The real worker, with Quire as its own peer."""
    models.make("tiny", tmp_path / "tiny")
    request = Request("measure", str(tmp_path / "tiny"), str(tmp_path), "bf16", ("decode:2:5", "decode:2:60"), 1)
    turn = Turn([sys.executable, "-m", "cpu_peers.turns", "quire"], request, surroundings(1), SOURCES)
    try:
        assert turn.notes["quire"]
        assert all(turn.rate(8) > 0 for _ in range(3))
    finally:
        turn.close()
