"""The pure parts of the CPU peers' benchmark, and a worker on a fake peer: no model and no network."""

import argparse
import json
import math
import sys
import types

import cpu_peers as package
import numpy as np
import pytest
from cpu_peers import environments, machine, report, worker
from cpu_peers.measure import Measurement, serve
from cpu_peers.peers.gguf_file import gguf_name, interleaved, read_bfloat16
from cpu_peers.peers.llama_cpp import Slots, _Sequence
from cpu_peers.protocol import MARK, Answer, Request, Unavailable, ask, joined
from cpu_peers.workload import (
    ALL_POINTS,
    LONGEST,
    SHORTEST,
    Arrival,
    Point,
    arrivals,
    capacity,
    parts,
    percentile,
    spread,
)
from hypothesis import given, settings
from hypothesis import strategies as st


class FakeEngine:
    """One token per request and step; a step takes `seconds` of a clock that only this moves."""

    vocab, skips = 100, {}

    def __init__(self, seconds=0.5):
        self.left, self.now, self.added, self.seconds, self.notes = {}, 0.0, [], seconds, {"fake": 1}

    def add(self, key, prompt, count):
        assert key not in self.left
        self.left[key] = count
        self.added.append((self.now, len(prompt), count))

    def step(self):
        self.now += self.seconds
        deltas = [(key, [7]) for key in self.left]
        self.left = {key: count - 1 for key, count in self.left.items() if count > 1}
        return deltas

    def busy(self):
        return bool(self.left)

    def sleep(self, seconds):
        self.now += seconds


@pytest.mark.parametrize("point", ALL_POINTS, ids=str)
def test_a_point_is_read_as_it_is_written(point):
    assert Point.parse(str(point)) == point


@pytest.mark.parametrize("text", ["decode:1", "decode:0:64", "prefill:x", "served", "speed:1:2", ""])
def test_other_points_are_refused(text):
    with pytest.raises(ValueError, match=r"point|invalid literal"):
        Point.parse(text)


def test_the_capacity_holds_every_point():
    need = capacity(point for point in ALL_POINTS if point.kind != "served")
    assert need.sequences == 32
    assert need.length >= 2048 + 32
    assert capacity([Point("served", 64, 0)]).sequences == 64
    assert capacity([Point("served", 64, 0)]).length >= 2 * LONGEST


@settings(max_examples=15)
@given(seed=st.integers(0, 99), vocab=st.integers(20, 200_000))
def test_arrivals_are_seeded_in_order_and_within_their_bounds(seed, vocab):
    work = arrivals(20, vocab, seed)
    assert work == arrivals(20, vocab, seed)
    assert [item.at for item in work] == sorted(item.at for item in work)
    for item in work:
        assert SHORTEST <= len(item.prompt) <= LONGEST
        assert SHORTEST <= item.count <= LONGEST
        assert all(10 <= token < vocab for token in item.prompt)


def test_gaps_between_arrivals_have_the_mean_and_the_spread_of_a_poisson_process():
    times = [item.at for item in arrivals(1500, 50, 3, rate=4.0)]
    gaps = np.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() == pytest.approx(0.25, rel=0.1)


def test_statistics():
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 3.0
    assert percentile([1.0], 0.99) == 1.0
    assert spread([1.0, 2.0, 3.0]) == 1.0
    assert spread([1.0]) is None
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@pytest.mark.parametrize(
    ("load", "shares", "words"),
    [(0.3, [0.99, 0.98], []), (1.4, [0.99, 0.98], ["load"]), (0.3, [0.99, 0.6], ["spinning"]), (9, [0.1], ["l", "s"])],
)
def test_a_busy_machine_is_told_with_its_reasons(load, shares, words):
    reasons = machine.Quiet(load, shares).reasons(2)
    assert len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


def test_looking_spins_one_process_per_core():
    assert machine.look(3, lambda count: [1.0] * count).shares == [1.0] * 3
    [share] = machine.spin_shares(1, seconds=0.05)
    assert 0 < share <= 1.05


def test_a_request_survives_json_and_bad_ones_are_refused():
    request = Request("measure", "a", "b", "int4", ["prefill:8"], 2, 5)
    assert Request.read(request.write()) == request
    for field, value in (("action", "guess"), ("precision", "fp3")):
        with pytest.raises(ValueError, match=value):
            Request.read(json.dumps(json.loads(request.write()) | {field: value}))


def test_the_answer_is_found_among_a_librarys_prints():
    answer = Answer({"prefill:8": 1.5}, {"served:2": "no"}, {"v": "1"}, {"load s": 2.0}, [1, 2])
    assert Answer.find(f"hello\nhalf a line {answer.write()}\nbye") == answer
    assert Answer.find("hello\n") is None


def test_a_served_workload_has_a_worker_of_its_own_and_one_answer_comes_of_both():
    points = ["decode:1:64", "served:4", "prefill:8"]
    assert parts(points) == [["decode:1:64", "prefill:8"], ["served:4"]]
    assert parts(["served:4"]) == [["served:4"]]
    steps = Answer({"decode:1:64": 2.0}, {"prefill:8": "no"}, {"v": "1"}, {"load s": 2.0}, [1])
    served = Answer({"served:4": 3.0}, {}, {"v": "1"}, {"load s": 5.0, "wait s": 1.0}, [1])
    both = joined([(points[::2], steps), (points[1:2], served)])
    assert both.figures == {"decode:1:64": 2.0, "served:4": 3.0}
    assert both.reasons == {"prefill:8": "no"}
    assert both.extra == {"load s": 2.0, "wait s": 1.0}
    assert (both.notes, both.probe) == ({"v": "1"}, [1])
    dead = joined([(points[::2], steps), (points[1:2], Answer(reasons={"all": "ended"}))])
    assert dead.reasons == {"prefill:8": "no", "served:4": "ended"}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (f"print({MARK!r} + '{{}}'); raise SystemExit(3)", None),
        ("raise ValueError('no such file')", "status 1: ValueError: no such file"),
        ("import os; os.abort()", "no word"),
    ],
)
def test_a_worker_that_dies_leaves_its_last_words(code, reason, tmp_path):
    request = Request("measure", "", "", "bf16")
    answer = ask([sys.executable, "-c", code], request, {}, tmp_path)
    assert answer == Answer() if reason is None else reason in answer.reasons["all"]


def test_decode_counts_from_every_requests_first_token(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr("cpu_peers.measure.time.perf_counter", lambda: engine.now)
    measurement = Measurement(engine, 1)
    assert measurement.measure(Point("decode", 3, 40)) == pytest.approx(3 / 0.5)
    assert engine.added[-1][1:] == (40, 32)
    assert measurement.measure(Point("prefill", 1, 50)) == pytest.approx(50 / 0.5)
    assert len(measurement.probe(since=engine.now - 2.0)) == 8
    assert measurement.extra == {"first token from a cold start s": pytest.approx(2.5)}


def test_served_requests_are_added_when_they_arrive():
    engine = FakeEngine(seconds=1.0)
    work = [Arrival(2.0, [1] * 5, 2), Arrival(2.5, [1] * 6, 1), Arrival(9.0, [1], 1)]
    produced, seconds, waits = serve(engine, work, lambda: engine.now, engine.sleep)
    assert [at for at, *_ in engine.added] == [2.0, 3.0, 9.0]
    assert (produced, seconds) == (4, 10.0)
    assert waits == [1.0, 1.5, 1.0]


def fake_module(**changes):
    engine = FakeEngine()
    parts = {"prepare": lambda *_: "path", "Peer": lambda *_: engine} | changes
    return types.SimpleNamespace(**parts)


def unavailable(*_):
    raise Unavailable("not on this machine")


def test_a_worker_answers_point_by_point(monkeypatch):
    request = Request("measure", "c", "f", "bf16", ["decode:2:8", "served:3"])
    module = fake_module()
    engine = module.Peer()
    engine.skips = {"served": "serves no stream of requests"}
    done = worker.answer(module, request)
    assert set(done.figures) == {"decode:2:8"}
    assert done.reasons == {"served:3": "serves no stream of requests"}
    assert done.probe == [7] * 8
    assert worker.answer(fake_module(prepare=unavailable), request).reasons == {"all": "not on this machine"}
    monkeypatch.setattr(Measurement, "_decode", lambda *_: 1 // 0)
    assert "ZeroDivisionError" in worker.answer(module, request).reasons["decode:2:8"]


@settings(max_examples=60)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=9),
    size=st.integers(1, 4),
    room=st.integers(4, 16),
)
def test_slots_give_llama_cpp_every_token_once_in_its_place(prompts, size, room):
    slots = Slots(size, [_Sequence(str(i), list(range(length)), count) for i, (length, count) in enumerate(prompts)])
    seen, made = {}, {}
    while slots.waiting or slots.running:
        rows = slots.rows(room)
        assert 0 < len(rows) <= room
        for row in rows:
            seen.setdefault(slots.running[row.slot].key, []).append((row.position, row.token))
        for row in rows:
            if row.last:
                key, ended = slots.take(row.slot, 1000)
                made[key] = made.get(key, 0) + 1
                assert ended == (made[key] == prompts[int(key)][1])
    for index, (length, count) in enumerate(prompts):
        tokens = [*range(length), *[1000] * (count - 1)]
        assert seen[str(index)] == list(enumerate(tokens))


def test_weights_find_their_gguf_names():
    assert gguf_name("model.layers.11.self_attn.q_norm.weight") == "blk.11.attn_q_norm.weight"
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.self_attn.q_proj.bias")


def test_interleaving_brings_the_halves_of_a_head_side_by_side():
    weight = np.arange(16).reshape(8, 2)
    assert interleaved(weight, 2)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]


def test_bfloat16_weights_are_read_as_they_were_saved(tmp_path):
    import torch
    from safetensors.torch import save_file

    weights = {"a.weight": torch.randn(3, 5).bfloat16(), "b.weight": torch.randn(7).bfloat16()}
    save_file(weights, tmp_path / "w.safetensors")
    for name, bits in read_bfloat16(tmp_path / "w.safetensors"):
        assert torch.equal(torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16), weights.pop(name))
    assert not weights
    save_file({"c": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="F32"):
        list(read_bfloat16(tmp_path / "w.safetensors"))


def group():
    point = "decode:1:64"
    return report.Group(
        "tiny",
        "int4",
        [point],
        {
            "quire": [Answer({point: value}, probe=[1, 2, 3]) for value in (10.0, 30.0, 20.0)],
            "llama_cpp": [Answer({point: 8.0}, probe=[1, 2, 9], extra={"load s": 1.0}), Answer({point: 12.0})],
            "transformers": [Answer(reasons={"all": "no 4-bit weights"})],
        },
    )


def test_the_table_gives_medians_ratio_and_reasons():
    text = report.table(group())
    assert "| decode:1:64 | 20.0 | 10.0 | - | 2.00 |" in text
    assert "* transformers, all points: no 4-bit weights." in text
    assert "llama_cpp 2" in text
    assert group().ratio("quire", "decode:1:64") == 2.0
    assert report.Group("m", "bf16", ["p"], {"quire": [Answer()]}).ratio("quire", "p") is None


def test_the_report_and_its_json_carry_the_run():
    run = {
        "date": "2026-01-02",
        "command": "x",
        "machine": {"processor": "P", "cores": 2},
        "threads": 2,
        "rounds": 3,
        "limits": [{"read GB/s": 30.0}, {"read GB/s": 50.0}],
        "busy": ["the load average is 9"],
    }
    text = report.markdown(run, [group()])
    assert "read GB/s 40.0" in text
    assert "busy" in text
    assert "busy" not in report.markdown(run | {"busy": []}, [group()])
    [data] = json.loads(json.dumps(report.record([group()])))
    point = data["peers"]["quire"]["points"]["decode:1:64"]
    assert point["median"] == 20.0
    assert math.isclose(point["spread"], 1.0)
    assert data["peers"]["transformers"]["points"]["decode:1:64"]["reason"] == "no 4-bit weights"


@pytest.fixture
def command():
    """The script beside the package, which has the package's name."""
    import importlib.util
    from pathlib import Path

    path = Path(package.__file__).parents[1] / "cpu_peers.py"
    spec = importlib.util.spec_from_file_location("cpu_peers_command", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_quick_means_one_model_and_three_points(command, tmp_path):
    plan = command.plan_of(command.parser().parse_args(["--quick", "--cache", str(tmp_path), "--threads", "3"]))
    assert plan.models == ["qwen3-0.6b"]
    assert plan.points == ["decode:1:64", "decode:8:64", "prefill:512"]
    text = command.command_of(plan, True)
    assert text.endswith("--force")
    assert str(tmp_path) not in text
    with pytest.raises(argparse.ArgumentTypeError, match="none of"):
        command.words("quire,vllm", command.PEERS)


def test_a_peer_without_a_part_in_the_points_is_left_out(command, capsys):
    parse = command.parser().parse_args
    assert not {"llama_server", "quire_server"} & set(command.plan_of(parse(["--quick"])).peers)
    assert "llama_server: has no part" in capsys.readouterr().err
    chosen = ["--peers", "quire,transformers,llama_server", "--points", "served:4"]
    assert command.plan_of(parse(chosen)).peers == ["quire", "llama_server"]


def test_windows_are_of_decode_points(command):
    plan = command.plan_of(command.parser().parse_args(["--windows", "5", "--steps", "4", "--threads", "1"]))
    assert {Point.parse(point).kind for point in plan.points} == {"decode"}
    text = command.command_of(plan, False)
    assert "--windows 5 --steps 4 --threads 1" in text
    assert "--rounds" not in text
    for refused in (
        ["--windows", "1"],
        ["--windows", "5", "--rounds", "2"],
        ["--windows", "5", "--points", "prefill:9"],
    ):
        with pytest.raises(SystemExit, match="--windows takes 2 or more"):
            command.plan_of(command.parser().parse_args(refused))


def test_a_busy_machine_is_refused_before_anything_is_measured(command, monkeypatch):
    monkeypatch.setattr(command, "prepare", lambda plan: ({}, {}))
    monkeypatch.setattr(command.machine, "look", lambda cores: machine.Quiet(99.0, [0.2]))
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["cpu_peers.py"])
    with pytest.raises(SystemExit, match=r"busy.*--force"):
        command.main()


def test_an_environment_is_made_once_and_its_failure_is_told(tmp_path, monkeypatch):
    calls = []

    def pip(python, arguments, build, output):
        calls.append(arguments)
        output.write("ERROR: no such package\n")
        return status

    monkeypatch.setattr(environments, "_pip", pip)
    monkeypatch.setattr(environments.venv, "create", lambda folder, with_pip: folder.mkdir(parents=True, exist_ok=True))
    status = 1
    with pytest.raises(Unavailable, match="no such package"):
        environments.interpreter("x", ["a"], {}, tmp_path)
    status = 0
    python = environments.interpreter("x", ["a"], {}, tmp_path, ["b"])
    assert python.startswith(str(tmp_path))
    assert [words[0] for words in calls] == ["install", "install", "uninstall"]
    assert environments.interpreter("x", ["a"], {}, tmp_path) == python
    assert len(calls) == 3
    assert environments.interpreter("quire", [], {}, tmp_path) == sys.executable
