"""resolve(): every auto is decided once, and what cannot be is said with its reason."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from quire.choices import explain_point
from quire.config import configure
from quire.errors import ConfigError, UnsupportedModel
from quire.hooks import hookimpl
from quire.loader.checkpoint import resolve_checkpoint
from quire.plugin import AttentionBackend, AttentionCaps, Provider
from quire.registry import HostOptions, PluginHost, build_host
from quire.resolve import redacted, resolve
from quire.testing.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("checkpoints") / "llama")


@pytest.fixture(scope="module")
def host():
    return build_host()


def resolved_for(folder, host, **options):
    configured = configure({"model": str(folder), **options}, environment={})
    return resolve(configured, host, resolve_checkpoint(str(folder)))


class Nondeterministic(AttentionBackend):
    caps = AttentionCaps(frozenset({"cpu"}), frozenset({torch.float32}))

    def forward(self, layer, q, k, v, kv, batch, plan, out):
        pass


class SmallHeads(Nondeterministic):
    caps = AttentionCaps(frozenset({"cpu"}), frozenset({torch.float32}), head_dims=frozenset({4}), deterministic=True)


class Extra:
    @hookimpl
    def quire_providers(self):
        here = "resolve_targets"
        return [
            Provider("attention", "fast", f"{here}:Nondeterministic", 1, priority=90),
            Provider("attention", "small", f"{here}:SmallHeads", 1, priority=99),
        ]


@pytest.fixture
def extended(monkeypatch):
    """The installed plugins, and one with two more attention backends."""
    import importlib.metadata
    import sys

    module = type(sys)("resolve_targets")
    module.Nondeterministic, module.SmallHeads = Nondeterministic, SmallHeads
    monkeypatch.setitem(sys.modules, "resolve_targets", module)

    class Entry:
        name = "extra"

        def load(self):
            return Extra()

    return PluginHost([*importlib.metadata.entry_points(group="quire"), Entry()], HostOptions())


def test_a_cache_dtype_is_used_only_where_it_is_declared(llama, extended):
    resolved = resolved_for(llama, extended, kv_cache_dtype="fp8_e4m3")
    assert resolved.selected["attention"].provider.name == "cpu_ref"
    assert resolved.cache_dtype is torch.float8_e4m3fn
    assert resolved.to_dict()["kv_cache_dtype"] == "fp8_e4m3"
    (fast,) = [item for item in explain_point(resolved.config, extended, "attention", resolved.checkpoint)
               if item.provider.name == "fast"]  # fmt: skip
    assert "KV cache dtype 'fp8_e4m3' is not one of ['auto']" in fast.reasons
    with pytest.raises(ConfigError, match="'fp8_e4m3' is not one of"):
        resolved_for(llama, extended, kv_cache_dtype="fp8_e4m3", attention_backend="fast")


def test_every_auto_is_decided(llama, host):
    resolved = resolved_for(llama, host)
    values = resolved.to_dict()
    assert json.loads(json.dumps(values)) == values
    left = {name for name, value in values.items() if value == "auto"}
    assert left == {"kv_cache_memory", "output_parser"}  # measured after loading, and read off the template
    assert values["dtype"] == "float32"
    assert values["max_model_len"] == 256
    assert resolved.selected["model"].provider.name == "llama"
    assert [choice.provider.name for choice in resolved.processors] == [
        "token_filter", "logit_bias", "min_tokens", "penalties",
    ]  # fmt: skip


def test_what_was_said_is_kept_with_its_origin(llama, host):
    resolved = resolved_for(llama, host, dtype="bfloat16", max_model_len=100, kv_allocator="radix", metrics_sinks="log")
    assert (resolved.dtype, resolved.max_model_len) == (torch.bfloat16, 100)
    assert resolved.selected["kv_allocator"].provider.name == "radix"
    assert [choice.provider.name for choice in resolved.sinks] == ["log"]
    assert resolved.origins["dtype"] == "argument"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 257}, "allows at most 256"),
        ({"attention_backend": "cpu_reff"}, "did you mean 'cpu_ref'"),
        ({"device": "cdu"}, "there is no device 'cdu'"),
        ({"ops": {"rms_norm": "nope"}}, "there is no op 'nope'"),
        ({"ops": {"rms_nrm": "torch"}}, "did you mean 'rms_norm'"),
        ({"logits_processors": "none_such"}, "there is no logits_processor"),
        ({"output_parser": "nope"}, "there is no output_parser"),
        ({"quantization": "gptq9"}, "there is no quantization 'gptq9'"),
        ({"plugin_options": {"nobody": {}}}, "no loaded plugin provides"),
        ({"plugin_options": {"radix": {"nope": 1}}}, "no option 'nope'"),
    ],
)
def test_what_cannot_be_is_refused(llama, host, options, message):
    with pytest.raises(ConfigError, match=message):
        resolved_for(llama, host, **options)


def test_attention_is_chosen_for_the_models_layers(llama, extended):
    resolved = resolved_for(llama, extended)
    assert resolved.selected["attention"].provider.name == "fast"
    assert "head size 16" in resolved.selected["attention"].rejected[0].reasons[0]
    deterministic = resolved_for(llama, extended, deterministic=True)
    assert deterministic.selected["attention"].provider.name in ("cpu_native", "cpu_ref")
    with pytest.raises(ConfigError, match="does not declare deterministic"):
        resolved_for(llama, extended, deterministic=True, attention_backend="fast")


def test_explain_tells_the_same_story(llama, extended):
    config = configure({"model": str(llama)}, environment={}).config
    table = {c.provider.name: c for c in explain_point(config, extended, "attention", resolve_checkpoint(str(llama)))}
    assert table["fast"].chosen
    assert "head size" in table["small"].reasons[0]
    assert table["cpu_ref"].note == "extra:fast stands before it"
    models = explain_point(config, extended, "model", resolve_checkpoint(str(llama)))
    assert [c.provider.name for c in models if c.chosen] == ["llama"]
    assert all(c.reasons or c.note for c in models if not c.chosen)
    assert sum(candidate.chosen for candidate in explain_point(config, extended, "device", None)) == 1
    (sampler,) = [c.provider.name for c in explain_point(config, extended, "sampler", None) if c.chosen]
    assert sampler in ("cpu_native", "torch")


def test_an_architecture_that_nobody_serves(llama, host, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config |= {"architectures": ["NoSuchModelForCausalLM"], "model_type": "no_such_model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="NoSuchModelForCausalLM"):
        resolved_for(tmp_path, host)


def test_a_quantized_checkpoint_needs_a_method(llama, host, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config["quantization_config"] = {"quant_method": "made_up"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="made_up"):
        resolved_for(tmp_path, host)


def test_options_of_a_provider_that_is_not_in_use_are_pointed_out(llama, host, caplog):
    with caplog.at_level(logging.WARNING, logger="quire"):
        resolved_for(llama, host, plugin_options={"radix": {}})
        assert "kv_allocator 'radix' is not in use" in caplog.text
        caplog.clear()
        resolved_for(llama, host, plugin_options={"radix": {}}, kv_allocator="radix")
    assert caplog.text == ""


def test_secrets_are_masked():
    options = {"sink": {"api_key": "s3cret", "urls": [{"password": "p"}], "interval": 3, "token": ""}}
    assert redacted(options) == {"sink": {"api_key": "***", "urls": [{"password": "***"}], "interval": 3, "token": ""}}


def test_op_sets_of_one_name_are_told_apart(llama):
    """Two plugins offer an op set `torch`: the name alone is ambiguous, and each can be asked for in full."""
    import importlib.metadata

    class Twin:
        name = "twin"

        def load(self):
            class Plugin:
                @hookimpl
                def quire_providers(self):
                    return [Provider("op", "torch", "quire_cpu_ref.ops:TorchOps", 1, priority=5)]

            return Plugin()

    host = PluginHost([*importlib.metadata.entry_points(group="quire"), Twin()], HostOptions())
    names = [choice.name for choice in resolved_for(llama, host).op_sets]
    assert names.index("twin:torch") < names.index("cpu_ref:torch")
    with pytest.raises(ConfigError, match="several plugins"):
        resolved_for(llama, host, ops={"linear": "torch"})
    resolved = resolved_for(llama, host, ops={"linear": "cpu_ref:torch", "default": "twin:torch"})
    assert resolved.ops == {"linear": "cpu_ref:torch", "default": "twin:torch"}


def test_the_engine_honours_an_op_override(llama, host, monkeypatch):
    from quire.engine.build import build_model
    from quire.layers import factory

    made = []
    monkeypatch.setattr(factory.Operations, "__init__", _noting(factory.Operations.__init__, made))
    build_model(resolved_for(llama, host, ops={"linear": "torch"}), host)
    assert made == [{"linear": "cpu_ref:torch"}]


def test_a_quant_kernel_is_an_op_set_of_its_kind(llama, host, caplog):
    from quire.engine.build import build_model

    resolved = resolved_for(llama, host, ops={"linear": "torch"}, quant_kernel="dequant")
    assert resolved.ops == {"linear": "cpu_ref:torch", "quant_linear": "quant:dequant"}
    assert resolved.to_dict()["ops"] == {"linear": "torch", "quant_linear": "dequant"}
    build_model(resolved, host)
    assert "quant:dequant is named for quant_linear, but the model has no such operation" in caplog.text
    with pytest.raises(ConfigError, match=r"'torch', which serves .*linear"):
        resolved_for(llama, host, quant_kernel="torch")


def _noting(init, made):
    def wrapped(self, op_sets, overrides):
        made.append(dict(overrides))
        init(self, op_sets, overrides)

    return wrapped
