"""`quire quantize`: what it writes loads again and means what the report says; a killed run is taken up."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from quire import LLM, ConfigError, SamplingParams, UnsupportedModel
from quire.cli.app import app
from quire.commands import resolve_checkpoint
from quire.testing.tiny_models import make_checkpoint
from quire_quant.card import REPORT
from quire_quant.command import bar
from quire_quant.layer import Recipe
from quire_quant.produce import PROGRESS, produce
from quire_quant.walk import Walk
from safetensors.torch import load_file
from typer.testing import CliRunner

ROWS = torch.randint(3, 300, (10, 32), generator=torch.Generator().manual_seed(0))
PROMPT = ROWS[0].tolist()


def checkpoint(architecture, folder):
    return resolve_checkpoint(str(make_checkpoint(architecture, folder)))


def assert_same_tensors(one, other):
    names = [path.name for path in one.glob("*.safetensors")]
    assert names
    for name in names:
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def all_logprobs(folder):
    llm = LLM(str(folder), dtype="float32", num_kv_blocks=40)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20, ignore_eos=True)
    (out,) = llm.generate([PROMPT], params, use_tqdm=False)
    return [{token: entry.logprob for token, entry in row.items()} for row in out.prompt_logprobs[1:]]


def perplexity_by_quire(folder, rows):
    # Phi-3's long factors would serve requests past 128 tokens.
    llm = LLM(str(folder), dtype="float32", num_kv_blocks=40, max_model_len=100)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    losses = []
    for row, out in zip(rows.tolist(), llm.generate(rows.tolist(), params, use_tqdm=False), strict=True):
        losses += [-out.prompt_logprobs[i][token].logprob for i, token in enumerate(row) if i]
    return torch.tensor(losses).mean().exp().item()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma2", "phi3"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_is_written_loads_and_has_the_perplexity_that_is_reported(architecture, method, tmp_path):
    """The report is taken through transformers' layers with dequantized weights: the engine must agree."""
    source = checkpoint(architecture, tmp_path / "plain")
    report = produce(source, tmp_path / "out", Recipe(method, 4, 32, sym=method == "gptq"), ROWS)
    assert not report.skipped
    assert len(report.errors) == 2 * (4 if architecture == "phi3" else 7)
    assert 0 < max(report.errors.values()) < 0.25
    held = ROWS[-1:]
    assert perplexity_by_quire(source.folder, held) == pytest.approx(report.perplexity_before, rel=1e-3)
    assert perplexity_by_quire(tmp_path / "out", held) == pytest.approx(report.perplexity_after, rel=1e-3)
    assert report.bytes_after < report.bytes_before
    assert json.loads((tmp_path / "out" / REPORT).read_text())["errors"] == report.errors


def test_awq_factors_change_nothing_but_rounding(tmp_path):
    """At 8 bits what is left of the folded factors is next to nothing; a factor in the wrong place shows."""
    source = checkpoint("llama", tmp_path / "plain")
    produce(source, tmp_path / "out", Recipe("awq", 8, 32, sym=False), ROWS)
    moved = load_file(tmp_path / "out" / "model-00001-of-00003.safetensors")["model.layers.0.input_layernorm.weight"]
    assert not torch.equal(
        moved, load_file(source.folder / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    )
    for ours, theirs in zip(all_logprobs(tmp_path / "out"), all_logprobs(source.folder), strict=True):
        assert all(abs(ours[token] - theirs[token]) < 0.1 for token in ours.keys() & theirs.keys())


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_of_awq_are_stored_in_gptqs_format(bits, tmp_path):
    source = checkpoint("llama", tmp_path / "plain")
    report = produce(source, tmp_path / "out", Recipe("awq", bits, -1, sym=False), ROWS)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "gptq"
    assert settings["checkpoint_format"] == "gptq_v2"
    assert perplexity_by_quire(tmp_path / "out", ROWS[-1:]) == pytest.approx(report.perplexity_after, rel=1e-3)


def test_layers_that_do_not_fit_stay_as_they_were(tmp_path):
    source = checkpoint("llama", tmp_path / "plain")  # 64 and 96 inputs
    report = produce(source, tmp_path / "out", Recipe("rtn", 4, 64, sym=True), None)
    assert report.skipped == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert report.perplexity_after is None
    assert not report.errors
    before, after = load_file(source.folder / "model.safetensors"), {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(path)
    assert torch.equal(after["model.layers.1.mlp.down_proj.weight"], before["model.layers.1.mlp.down_proj.weight"])
    all_logprobs(tmp_path / "out")


@pytest.mark.parametrize("architecture", ["olmo2", "cohere2", "granite", "gemma3", "stablelm"])
def test_awq_folds_only_where_it_changes_nothing(architecture, tmp_path):
    """Norms after the sublayer, one norm for both, 1 + weight, biases; logits with a factor of their own."""
    source = checkpoint(architecture, tmp_path / "plain")
    report = produce(source, tmp_path / "out", Recipe("awq", 8, 32, sym=False), ROWS)
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=0.01)
    assert perplexity_by_quire(source.folder, ROWS[-1:]) == pytest.approx(report.perplexity_before, rel=1e-3)


def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    source, loaded = checkpoint("llama", tmp_path / "plain"), []
    advance = Walk.advance

    def watch(walk, index, hidden):
        loaded.append([not layer.self_attn.q_proj.weight.is_meta for layer in walk.model.model.layers])
        advance(walk, index, hidden)

    monkeypatch.setattr(Walk, "advance", watch)
    produce(source, tmp_path / "out", Recipe("gptq", 4, 32, sym=True), ROWS)
    assert loaded == [[True, False]] * 2 + [[False, True]] * 2


def test_a_run_ended_by_the_system_is_taken_up(tmp_path):
    """SIGKILL in the midst of the second layer; the command goes on from the first and ends as if nothing had been."""
    source = checkpoint("qwen3", tmp_path / "plain")
    recipe, out = Recipe("gptq", 4, 32, sym=True), tmp_path / "out"
    rows = tmp_path / "rows.pt"
    torch.save(ROWS, rows)
    program = f"""
import os, signal, torch
import quire_quant.produce as p
from quire.commands import resolve_checkpoint
from quire_quant.layer import Recipe
solve, runs = p.solve_layer, []
def die(*arguments):
    runs.append(solve(*arguments))
    if len(runs) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return runs[-1]
p.solve_layer = die
source = resolve_checkpoint({str(source.folder)!r})
p.produce(source, p.Path({str(out)!r}), {recipe!r}, torch.load({str(rows)!r}))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert sorted(path.name for path in out.iterdir()) == ["model-00001-of-00003.safetensors", PROGRESS]
    report = produce(source, out, recipe, ROWS)
    assert asdict(report) | {"seconds": 0} == asdict(produce(source, tmp_path / "whole", recipe, ROWS)) | {"seconds": 0}
    assert not (out / PROGRESS).exists()
    assert_same_tensors(tmp_path / "whole", out)


class Killed(Exception):
    pass


def test_a_stopped_run_is_taken_up_and_ends_the_same(tmp_path):
    source = checkpoint("qwen3", tmp_path / "plain")
    recipe, out = Recipe("gptq", 3, 32, sym=True), tmp_path / "out"
    whole = produce(source, tmp_path / "whole", recipe, ROWS)

    def kill(done, total, text):
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        produce(source, out, recipe, ROWS, kill)
    assert (out / PROGRESS).is_file()
    assert not (out / "config.json").exists()
    first = out / "model-00001-of-00003.safetensors"
    written = first.stat().st_mtime_ns
    for other in (Recipe("gptq", 4, 32, sym=True), Recipe("gptq", 3, 64, sym=True)):
        with pytest.raises(ConfigError, match="unfinished run of other settings"):
            produce(source, out, other, ROWS)
    report = produce(source, out, recipe, ROWS)
    assert first.stat().st_mtime_ns == written
    assert report.errors == whole.errors
    assert report.perplexity_after == whole.perplexity_after
    assert_same_tensors(tmp_path / "whole", out)
    with pytest.raises(ConfigError, match="not an empty folder"):
        produce(source, out, recipe, ROWS)


def test_refusals(tmp_path):
    source = checkpoint("llama", tmp_path / "plain")
    with pytest.raises(ConfigError, match="gptq needs calibration text"):
        produce(source, tmp_path / "out", Recipe("gptq", 4, 32, sym=True), None)
    produce(source, tmp_path / "out", Recipe("rtn", 4, 32, sym=True), None)
    with pytest.raises(ConfigError, match="quantized already"):
        produce(resolve_checkpoint(str(tmp_path / "out")), tmp_path / "again", Recipe("rtn", 4, 32, sym=True), None)
    for architecture in ("mixtral", "qwen3_moe"):
        experts = checkpoint(architecture, tmp_path / architecture)
        with pytest.raises(UnsupportedModel, match=r"has experts.*`--quantization int8`"):
            produce(experts, tmp_path / "moe", Recipe("rtn", 4, 32, sym=True), None)
    with pytest.raises(UnsupportedModel, match="not a plain decoder"):
        produce(checkpoint("gpt2", tmp_path / "g"), tmp_path / "moe", Recipe("rtn", 4, 32, sym=True), None)
    assert not (tmp_path / "moe").exists()


def test_the_command(tmp_path):
    text = tmp_path / "text.jsonl"
    chat = {"messages": [{"role": "user", "content": "What is 27+45?"}, {"role": "assistant", "content": "72"}]}
    text.write_text((json.dumps(chat) + "\n" + json.dumps({"text": "The quick brown fox. " * 20}) + "\n") * 20)
    out = tmp_path / "out"
    arguments = ["quantize", "quire-tiny", str(out), "--bits", "4", "--group-size", "64", "--calibration", str(text)]
    answer = CliRunner().invoke(app, [*arguments, "--samples", "4", "--sequence-length", "64"], catch_exceptions=False)
    assert answer.exit_code == 0
    report = json.loads((out / REPORT).read_text())
    assert report["perplexity_after"] < 1.2 * report["perplexity_before"]
    assert f"{report['perplexity_after']:.4f}" in answer.stdout
    assert "perplexity, held-out" in (out / "README.md").read_text()
    (reply,) = LLM(str(out)).chat(
        [[{"role": "user", "content": "What is 27+45?"}]], SamplingParams(temperature=0), use_tqdm=False
    )
    assert "72" in reply.outputs[0].text


def test_the_bar_counts_layers_and_estimates_the_time_left(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with bar() as show:
        for done in range(3):
            show(done, 4, f"layer {done}")
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "layer 2" in plain
    assert "2/4" in plain
    assert re.search(r"\d:\d\d:\d\d", plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "5"], "bits is 5 fix: allowed are 2, 3, 4, 8"),
        (["--group-size", "12"], "group_size is 12"),
        (["--group-size", "40"], "fits no layer of quire-tiny: their inputs are [192, 512]"),
        (["--method", "awq"], "awq needs calibration text"),
        (["--method", "best"], "'best' is not one of"),
    ],
)
def test_options_that_are_not_possible(options, words, tmp_path):
    method = [] if "--method" in options else ["--method", "rtn"]
    answer = CliRunner().invoke(app, ["quantize", "quire-tiny", str(tmp_path / "o"), *method, *options])
    assert answer.exit_code == 2
    assert words in " ".join(answer.stderr.replace("│", " ").split())
    assert not (tmp_path / "o").exists()


def test_what_is_there_is_not_written_over(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for place in (tmp_path, tmp_path / "notes"):
        answer = CliRunner().invoke(app, ["quantize", "quire-tiny", str(place), "--method", "rtn"])
        assert answer.exit_code == 2
        assert "not an empty folder" in " ".join(answer.stderr.split())
    assert (tmp_path / "notes").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 64), (4, 128), (3, -1), (2, 32)])
def test_the_plan_names_the_bytes_that_are_written(bits, group_size, tmp_path):
    recipe = Recipe("rtn", bits, group_size, sym=True)
    report = produce(resolve_checkpoint(None), tmp_path / "out", recipe, None)
    answer = CliRunner().invoke(app, ["plan", "--group-size", str(group_size), "--json"])
    planned = {row["form"]: row["num_bytes"] for row in json.loads(answer.stdout)["weights"]}
    assert planned[f"{bits} bits"] == report.bytes_after


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [("", "a.txt", "holds 0 tokens"), ("{}", "a.jsonl", "a.jsonl:1 is neither"), (None, "a.txt", "cannot be read")],
)
def test_calibration_files_that_do_not_serve(text, name, words, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    answer = CliRunner().invoke(app, ["quantize", "quire-tiny", str(tmp_path / "o"), "--calibration", str(path)])
    assert answer.exit_code == 2
    assert words in " ".join(answer.stderr.split())
