"""`EngineConfig`: bounds, sizes with units, errors that name field, value and what is allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire.config import EngineConfig
from quire.config_values import describe, from_text, parse_count
from quire.errors import ConfigError

INTEGERS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "seed", "step_timeout", "block_size",
            "num_kv_blocks", "kv_cache_memory", "chat_template_timeout")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8k", 8000), ("8K", 8000), ("8Ki", 8192), ("1M", 10**6), ("2GiB", 2 << 30), ("2GB", 2 * 10**9),
        ("1.5k", 1500), (" 64 ", 64), ("64", 64), (64, 64), ("auto", "auto"), ("1.0001k", "1.0001k"), ("k", "k"),
        ("-1k", "-1k"), ("", ""),
    ],
)  # fmt: skip
def test_counts_with_units(text, value):
    assert parse_count(text) == value


@given(st.integers(0, 2**40), st.sampled_from(["", "k", "M", "G", "Ki", "Mi", "Gi"]))
def test_a_count_is_its_number_times_its_unit(number, unit):
    factor = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]
    assert parse_count(f"{number}{unit}") == number * factor


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [-1, 2**80, "many", 1.5, True, float("nan")])
def test_every_integer_is_bounded(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is .*; it must be an integer from [0-9,]+ to [0-9,]+"):
        EngineConfig(**{name: value})


def test_no_integer_field_is_forgotten():
    found = {name for name, field in EngineConfig.model_fields.items() if "integer" in describe(field)}
    assert found == set(INTEGERS)
    assert all("from" in describe(EngineConfig.model_fields[name]) for name in found)


def test_unknown_fields_get_a_suggestion():
    with pytest.raises(ConfigError, match="'max_model_length' is not a configuration field") as caught:
        EngineConfig(max_model_length=3)
    assert caught.value.remedy == "did you mean 'max_model_len'?"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"dtype": "int8"}, "'auto' or 'float32' or 'bfloat16' or 'float16'"),
        ({"deterministic": "perhaps"}, "true or false"),
        ({"ops": "torch"}, "a mapping"),
        ({"plugin_options": {"radix": 3}}, "a mapping"),
        ({"metrics_sinks": 3}, "a list of names"),
        ({"sampler": None}, "text"),
    ],
)
def test_a_bad_value_says_what_is_allowed(fields, allowed):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**fields)
    name, value = next(iter(fields.items()))
    assert name in caught.value.message
    assert allowed in caught.value.message
    assert str(value)[:5] in caught.value.message or isinstance(value, dict)


def test_the_pool_is_sized_once():
    with pytest.raises(ConfigError, match="both size the KV pool"):
        EngineConfig(num_kv_blocks=8, kv_cache_memory="1GiB")


def test_the_quant_kernel_is_named_once():
    with pytest.raises(ConfigError, match=r"quant_kernel is 'a' and ops\.quant_linear is 'b'"):
        EngineConfig(quant_kernel="a", ops={"quant_linear": "b"})
    assert EngineConfig(quant_kernel="a", ops={"quant_linear": "a"}).named_ops() == {"quant_linear": "a"}
    assert EngineConfig(ops={"linear": "b"}).named_ops() == {"linear": "b"}


def test_it_is_frozen():
    config = EngineConfig()
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3


def test_defaults_pass_their_own_checks():
    defaults = {name: field.default for name, field in EngineConfig.model_fields.items()}
    assert EngineConfig(**defaults) == EngineConfig()


def test_lists_may_be_written_with_commas():
    assert EngineConfig(metrics_sinks="log, other").metrics_sinks == ("log", "other")
    assert EngineConfig(metrics_sinks=["log"]).metrics_sinks == ("log",)


@given(st.sampled_from(sorted(EngineConfig.model_fields)), st.text(max_size=12))
def test_any_text_is_a_value_or_a_config_error(name, text):
    value = from_text(EngineConfig.model_fields[name], text)
    try:
        EngineConfig(**{name: value})
    except ConfigError as error:
        assert name in error.message  # noqa: PT017
