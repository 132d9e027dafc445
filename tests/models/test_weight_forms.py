"""The forms in which checkpoints store one model: experts stacked or apart, heads tied or not, quantized layers."""

import itertools
import json

import pytest
import torch
from quire import UnsupportedModel
from quire.contract.model import ModelInit
from quire.contract.ops import LinearSpec, OpInit
from quire.contract.quant import QuantInit, QuantLinear, QuantMethod, QuantTensor
from quire.layers.factory import Operations, PluginLayers
from quire.layers.linear import Linear, Source
from quire.layers.weights import WeightTable
from quire.models import mixtral, qwen3, qwen3_moe
from quire.testing.model import ModelConformance, PagedRun
from quire.testing.tiny_models import make_checkpoint, reference_model
from quire_cpu_ref.attention import CpuRefAttention
from quire_cpu_ref.ops import TorchOps
from safetensors.torch import load_file, save_file

PROMPT = [[5, 7, 11, 13, 17, 19, 23]]
CPU = torch.device("cpu")


def logits(folder, spec):
    model, backend = ModelConformance().load(folder, spec, (CpuRefAttention, TorchOps))
    return PagedRun(model, backend, PROMPT).feed([len(PROMPT[0])])[0]


def check_against_transformers(folder, spec):
    with torch.inference_mode():
        theirs = reference_model(folder)(torch.tensor(PROMPT)).logits[0]
    torch.testing.assert_close(logits(folder, spec), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("architecture", "spec"), [("mixtral", mixtral.SPEC), ("qwen3_moe", qwen3_moe.SPEC)])
def test_experts_stacked_as_transformers_stores_them_in_its_own_format(architecture, spec, tmp_path):
    folder = make_checkpoint(architecture, tmp_path / "apart")
    apart = logits(folder, spec)
    reference_model(folder).save_pretrained(tmp_path / "stacked", save_original_format=False)
    stored = load_file(tmp_path / "stacked" / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in stored)
    assert torch.equal(logits(tmp_path / "stacked", spec), apart)
    save_file({n: t for n, t in stored.items() if "layers.1.mlp.experts.down" not in n}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"layers\.1\."):
        logits(folder, spec)


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_tied_head_that_is_stored_as_well(change, tmp_path):
    """Equal to the embedding it is the embedding; otherwise it counts, as in transformers."""
    folder = make_checkpoint("qwen3", tmp_path / "tied")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    before = logits(folder, qwen3.SPEC)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(
        tensors | {"lm_head.weight": embedding.roll(1, 0) * change + embedding * (1 - change)},
        folder / "model.safetensors",
    )
    assert torch.equal(logits(folder, qwen3.SPEC), before) == (change == 0.0)
    check_against_transformers(folder, qwen3.SPEC)


class Scaled(QuantLinear):
    """int8 codes times a scale per output; an optional shift per output; an order that sources share."""

    def tensors(self):
        n, k = self.spec.out_features, self.spec.in_features
        return (
            QuantTensor("codes", (n, k), torch.int8, 0),
            QuantTensor("scale", (n,), torch.float32, 0),
            QuantTensor("shift", (n,), torch.float32, 0, required=False),
            QuantTensor("order", (k,), torch.int64, None),
        )

    def finalize(self, tensors, device):
        shift = tensors.get("shift", torch.zeros(self.spec.out_features))
        return (tensors["codes"].float() * tensors["scale"][:, None] + shift[:, None])[:, tensors["order"]]

    def forward(self, x, state, bias):
        return x @ state.T if bias is None else x @ state.T + bias

    def dequantize(self, state):
        return state


class Method(QuantMethod):
    def linear(self, spec: LinearSpec, sources):
        return Scaled(spec)


SOURCES = {"q": 6, "k": 2, "v": 2}


def stored(*, shift):
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    order = torch.randperm(4, generator=generator)
    for name, size in SOURCES.items():
        tensors[f"{name}.codes"] = torch.randint(-9, 9, (size, 4), generator=generator, dtype=torch.int8)
        tensors[f"{name}.scale"] = torch.rand(size, generator=generator)
        tensors[f"{name}.order"] = order.clone()
        tensors[f"{name}.bias"] = torch.rand(size, generator=generator)
        if shift:
            tensors[f"{name}.shift"] = torch.rand(size, generator=generator)
    return tensors


def fused():
    method = Method(QuantInit({}, {}, CPU, torch.float32))
    layers = PluginLayers(Operations([("ops", TorchOps(OpInit(CPU, 16)))], {}), method)
    table = WeightTable()
    init = ModelInit(None, CPU, torch.float32, 16, layers)
    return table, Linear(init, table, [Source(name, size) for name, size in SOURCES.items()], 4, bias=True)


def expected(tensors, x):
    parts = []
    for name in SOURCES:
        weight = tensors[f"{name}.codes"].float() * tensors[f"{name}.scale"][:, None]
        weight = weight + tensors.get(f"{name}.shift", torch.zeros(len(weight)))[:, None]
        parts.append(x @ weight[:, tensors[f"{name}.order"]].T + tensors[f"{name}.bias"])
    return torch.cat(parts, -1)


@pytest.mark.parametrize("shift", [False, True])
def test_fused_quantized_layers_take_their_tensors_in_any_order(shift):
    tensors = stored(shift=shift)
    names = sorted(tensors)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    for order in (names, names[::-1], sorted(names, key=lambda n: n.split(".")[1])):
        table, linear = fused()
        assert all(table.load(name, tensors[name]) for name in order)
        assert table.missing() == []
        table.finish()
        torch.testing.assert_close(linear(x), expected(tensors, x))


def fill(table, tensors, *, reverse):
    for name in sorted(tensors, reverse=reverse):
        table.load(name, tensors[name])
    table.finish()


def test_fused_quantized_layers_must_agree():
    tensors = stored(shift=True)
    cases = {
        "'order' differs": tensors | {"k.order": torch.tensor([3, 2, 1, 0]), "q.order": torch.tensor([0, 1, 2, 3])},
        "'k' lacks 'shift'": {name: tensor for name, tensor in tensors.items() if name != "k.shift"},
    }
    for (words, case), reverse in itertools.product(cases.items(), (False, True)):
        table, _ = fused()
        with pytest.raises(UnsupportedModel, match=words):
            fill(table, case, reverse=reverse)


def test_missing_quantized_tensors_are_named():
    table, _ = fused()
    for name, tensor in stored(shift=False).items():
        if name != "v.scale":
            table.load(name, tensor)
    assert table.missing() == ["v.scale"]
