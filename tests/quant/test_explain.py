"""`quire plugins explain quantization`: which op set multiplies each layer, and why, without a look at the weights."""

import json

import pytest
from quire.cli.app import app
from quire_quant.testing import fp8_tensors, gptq_tensors, quantized_checkpoint, random_layer
from typer.testing import CliRunner

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "dynamic": {".*v_proj": {"bits": 8}}}


def quantize(name, inputs, outputs):
    if "up_proj" in name or name == "lm_head":
        return None
    bits = 8 if "v_proj" in name else 4
    layer = random_layer(inputs, outputs, bits, 32, sym=True)
    return gptq_tensors(layer, bits), layer.weight


def explain(*arguments):
    answer = CliRunner().invoke(app, [*arguments[:-1], "plugins", "explain", "quantization", *arguments[-1]])
    assert answer.exit_code == 0, answer.stderr
    return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, _ = quantized_checkpoint("llama", tmp_path_factory.mktemp("made"), quantize, GPTQ)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return path


def test_every_layer_is_told_with_the_reason(folder, monkeypatch):
    monkeypatch.setattr("quire.engine.explained.build_layers", blind(monkeypatch))
    answer = json.loads(explain("-p", "no:cpu_native", ["-m", str(folder), "--json"]).stdout)
    assert [row["name"] for row in answer["candidates"] if row["chosen"]] == ["gptq"]
    layers = {row["layers"].removeprefix("model.layers.*."): row for row in answer["layers"]}
    four, eight = (f"{bits} bits in groups of 32, zeros: middle" for bits in (4, 8))
    assert {name: row["form"] for name, row in layers.items()} == {
        "self_attn.q_proj": four,
        "self_attn.k_proj": four,
        "self_attn.v_proj": eight,
        "self_attn.o_proj": four,
        "mlp.gate_proj": four,
        "mlp.up_proj": "unquantized",
        "mlp.down_proj": four,
        "lm_head": "unquantized",
    }
    assert all(row["count"] == 2 for name, row in layers.items() if name != "lm_head")
    assert layers["self_attn.o_proj"]["op"].endswith(":int4pack")
    assert layers["self_attn.v_proj"]["op"].endswith(":dequant")
    assert "int4pack: codes have 8 bits; it reads up to 4" in layers["self_attn.v_proj"]["why"]
    assert "linear" not in layers["mlp.up_proj"]["why"]


def blind(monkeypatch):
    """From here on no tensor can be read."""
    from quire.engine.build import build_layers

    def refuse(*arguments):
        raise AssertionError("a tensor was read")

    def wrapped(config, host):
        monkeypatch.setattr("quire.loader.load.read_tensors", refuse)
        return build_layers(config, host)

    return wrapped


def test_an_op_set_that_is_named_is_used_and_told(folder, tmp_path, monkeypatch):
    (tmp_path / "quire.yaml").write_text(f"model: {{path: {folder}}}\nquant: {{kernel: dequant}}\n")
    file = ["-c", str(tmp_path / "quire.yaml")]
    answer = explain(*file, [])
    assert explain(file).stdout == answer.stdout  # behind the command as well as before it
    assert "`--quant-kernel NAME`" in answer.stderr
    text = answer.stdout
    (line,) = [line for line in text.splitlines() if "o_proj" in line]
    assert "quant:dequant" in line
    assert "it stands first, or was asked for by name" in line
    monkeypatch.setenv("QUIRE_QUANT__KERNEL", "dequant")
    assert explain(["-m", str(folder)]).stdout == text


def test_methods_that_multiply_by_themselves_and_models_without_one(tmp_path):
    settings = {"quant_method": "fp8"}
    folder, _ = quantized_checkpoint("llama", tmp_path, lambda n, k, m: fp8_tensors(k, m, (), seed=0), settings)
    text = explain(["-m", str(folder)]).stdout
    (line,) = [line for line in text.splitlines() if "down_proj" in line]
    assert "dequantized when it is loaded" in line
    assert "cpu_" in line  # cpu_native, or cpu_ref where there is no compiler
    text = explain([]).stdout
    assert "reads auto-round, gptq; the checkpoint is not quantized" in text
    assert "unquantized" in text
