"""`quire plan`: the bytes that it names are those that loading and quantizing then take."""

import json
import math
import shutil

import pytest
from quire import LLM, SamplingParams
from quire.cli.app import app
from quire.config import configure
from quire.contract.device import MemoryInfo
from quire.engine.build import engine_from, host_for
from quire.errors import UnsupportedModel
from quire.loader.checkpoint import bundled_folder
from quire.loader.outline import outline
from quire.testing.tiny_models import make_checkpoint
from typer.testing import CliRunner


def plan(*arguments):
    answer = CliRunner().invoke(app, ["plan", *map(str, arguments), "--json"], catch_exceptions=False)
    assert answer.exit_code == 0, answer.stderr
    return json.loads(answer.stdout)


def forms(found):
    return {(row["form"], row["methods"]): row["num_bytes"] for row in found["weights"]}


def test_bytes_of_weights_and_kv_are_those_that_the_engine_takes():
    found = plan("quire-tiny", "--block-size", 8, "--attention-backend", "cpu_ref")  # which has caches of 8 bits
    configured = configure({"block_size": 8, "attention_backend": "cpu_ref"})
    engine = engine_from(configured, host_for(configured.config))
    stored = engine.config.checkpoint
    assert forms(found)["bfloat16", ""] == stored.num_bytes == 2 * found["parameters"]
    per_token = {row["dtype"]: row["bytes_per_token"] for row in found["kv"]}
    assert per_token[found["compute_dtype"]] * 8 == engine.parts.executor.kv_budget().bytes_per_block
    assert per_token["float32"] == 2 * per_token["bfloat16"] == 2 * per_token["float16"] == 4 * per_token["fp8_e4m3"]
    assert all(row["bytes_per_request"] == row["bytes_per_token"] * 2048 for row in found["kv"])


@pytest.mark.parametrize(("kind", "bytes_per_head"), [("fp8_e4m3", 0), ("int8", 4)])
@pytest.mark.parametrize("backend", ["cpu_ref", "auto"])
def test_an_8_bit_cache_takes_the_bytes_that_were_planned_and_loses_little(kind, bytes_per_head, backend):
    """The bundled model answers as with the compute dtype; a token's keys and values take a byte each, and in int8 a
    scale for each head."""
    question = [{"role": "user", "content": "What is 27+45?"}]
    auto, small = (plan("quire-tiny", "--kv-cache-dtype", name) for name in ("auto", kind))
    tokens = [found["weights"][0]["kv_tokens"] for found in (auto, small)]
    llm = LLM(kv_cache_dtype=kind, num_kv_blocks=40, attention_backend=backend)
    size = llm.engine.config.spec.attention_layers(llm.engine.config.model_config)[0].head_dim
    assert tokens[1] > 0.97 * 4 * size / (size + bytes_per_head) * tokens[0]  # in float32
    per_token = {row["dtype"]: row["bytes_per_token"] for row in small["kv"]}
    assert llm.engine.parts.executor.kv_budget().bytes_per_block == 16 * per_token[kind]
    output = llm.chat(question, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    llm.shutdown()
    assert output[0].outputs[0].text == "72"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3", "olmo2"])
def test_config_json_alone_gives_the_same(architecture, tmp_path):
    full = make_checkpoint(architecture, tmp_path / "full")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(full / "config.json", alone)
    wanted, found = plan(full, "--group-size", 32), plan(alone, "--group-size", 32)
    assert forms(found) == forms(wanted)
    assert found["kv"] == wanted["kv"]


def test_experts_count_however_they_are_stacked(tmp_path):
    full = make_checkpoint("qwen3_moe", tmp_path / "full")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(full / "config.json", alone)
    wanted, found = forms(plan(full, "--group-size", 16)), forms(plan(alone, "--group-size", 16))
    assert found["bfloat16", ""] == wanted["bfloat16", ""]
    assert found["4 bits", "gptq, awq"] == pytest.approx(wanted["4 bits", "gptq, awq"], rel=0.02)
    assert found["4 bits", "gptq, awq"] < 0.9 * found["bfloat16", ""]


@pytest.mark.parametrize(("architecture", "is_tied"), [("llama", False), ("qwen3", True)])
def test_a_head_that_is_rounded_at_load_counts(architecture, is_tied, tmp_path):
    """In 8 bits, and in 6 beside layers of 4; beside the embedding, if that is the same tensor."""
    folder = make_checkpoint(architecture, tmp_path)
    tensors = outline(str(folder)).tensors
    assert ("lm_head.weight" not in tensors) == is_tied
    vocab, hidden = tensors["model.embed_tokens.weight"].shape
    found, groups = forms(plan(folder, "--group-size", 32, "--dtype", "bfloat16")), hidden // 32
    layers = sum(
        math.prod(tensor.shape)
        for name, tensor in tensors.items()
        if ".layers." in name and name.endswith("proj.weight")
    )
    norms = sum(2 * math.prod(tensor.shape) for tensor in tensors.values() if len(tensor.shape) == 1)
    scales, table = layers // 32 * 4 + 4 * vocab * groups, 2 * vocab * hidden
    for bits, head, name in ((8, 8, "int8 at load"), (4, 6, "int4 at load")):
        expected = layers * bits // 8 + vocab * hidden * head // 8 + scales + norms + table
        assert found[f"{bits} bits", name] == expected


def test_what_does_not_fit(monkeypatch):
    stored = outline(None).num_bytes

    def memory(free):
        monkeypatch.setattr("quire.contract.host_device.HostDevice.memory", lambda self: MemoryInfo(free * 2, free))
        return {row["form"]: row for row in plan("--max-model-len", 100, "--block-size", 10)["weights"]}

    rows = memory(stored)
    assert not rows["bfloat16"]["fits"]
    assert rows["bfloat16"]["kv_tokens"] == rows["float32"]["kv_tokens"] == 0
    assert rows["2 bits"]["fits"]
    per_token = 1536
    rows = memory(stored + 2 * per_token * 250)
    assert (rows["bfloat16"]["kv_tokens"], rows["bfloat16"]["requests"]) == (250, 2)
    assert not rows["float32"]["fits"]
    assert memory(stored + 2 * per_token * 20)["bfloat16"]["fits"]
    assert not memory(stored + 2 * per_token * 20 - 1)["bfloat16"]["fits"]


def test_of_an_id_only_small_files_are_fetched(monkeypatch, tmp_path):
    asked = []

    def fetch(model, revision, cache_dir, allow_patterns, ignore_patterns):
        asked.append((model, allow_patterns))
        shutil.copy(bundled_folder() / "config.json", tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    found = plan("org/name")
    assert asked == [("org/name", ["*.json"])]
    assert found["parameters"] == plan()["parameters"]


def test_an_architecture_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["X"], "model_type": "nobodys"}')
    with pytest.raises(UnsupportedModel, match="holds no weights, and transformers cannot make"):
        outline(str(tmp_path))


def test_tables_and_refusals():
    answer = CliRunner().invoke(app, ["plan"])
    assert "2,558,784 parameters" in answer.stderr
    assert "4.88 MiB" in answer.stdout
    assert "3.00 MiB" in answer.stdout
    for arguments, words in ((["--group-size", "0"], "--group-size is 0"), (["no/such/folder"], "no folder no/such")):
        answer = CliRunner().invoke(app, ["plan", *arguments])
        assert answer.exit_code == (2 if "--group-size" in arguments else 3)
        assert words in answer.stderr
