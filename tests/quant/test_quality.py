"""What methods lose, on whole models: GPTQ less than AWQ, AWQ less than rounding, fewer bits more than many."""

import pytest
import torch
from quire.commands import resolve_checkpoint
from quire.testing.tiny_models import make_checkpoint, reference_model
from quire_quant.layer import Recipe
from quire_quant.produce import produce
from safetensors.torch import load_file, save_file
from tiny.quantized import calibration_rows
from transformers import AutoTokenizer

ROWS = torch.randint(3, 300, (17, 64), generator=torch.Generator().manual_seed(0))


def correlated(architecture, folder):
    """A random checkpoint whose inputs of layers are correlated, and loud in a few channels, as trained models' are."""
    make_checkpoint(architecture, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    table = tensors["model.embed_tokens.weight"]
    mixed = torch.randn(len(table), 24, generator=generator) @ torch.randn(24, table.shape[1], generator=generator)
    mixed[:, torch.randperm(table.shape[1], generator=generator)[:3]] *= 8
    tensors["model.embed_tokens.weight"] = (mixed / 8 + 0.1 * table).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return resolve_checkpoint(str(folder))


def mean_errors(source, folder, rows, bits, group_size):
    """Mean relative error of a layer's output by each method."""
    means = {}
    for method in ("gptq", "awq", "rtn"):
        recipe = Recipe(method, bits, group_size, sym=method == "gptq")
        errors = produce(source, folder / f"{method}{bits}", recipe, rows).errors
        means[method] = sum(errors.values()) / len(errors)
    return means


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_errors_of_layers_are_ordered_on_random_models(architecture, tmp_path):
    means = mean_errors(correlated(architecture, tmp_path / "plain"), tmp_path, ROWS, 3, 32)
    assert means["gptq"] < 0.95 * means["awq"], means
    assert means["awq"] < means["rtn"], means


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3])
def test_perplexity_is_ordered_on_text_that_the_model_writes(bits, tmp_path):
    """No other model can have a lower one there, in the mean; the bundled model was trained on answers alone."""
    source = correlated("llama", tmp_path / "plain")
    starts = torch.randint(3, 300, (48, 1), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    rows = reference_model(source.folder).generate(
        starts, attention_mask=torch.ones_like(starts), do_sample=True, top_k=0, max_new_tokens=63, eos_token_id=None
    )
    reports = {
        method: produce(source, tmp_path / method, Recipe(method, bits, 32, sym=method == "gptq"), rows)
        for method in ("gptq", "awq", "rtn")
    }
    before = reports["gptq"].perplexity_before
    lost = {name: report.perplexity_after - before for name, report in reports.items()}
    assert 0 < lost["gptq"] < lost["awq"] < 0.6 * lost["rtn"], lost
    assert lost["gptq"] < 0.15 * before


@pytest.mark.slow
def test_errors_of_layers_are_ordered_on_the_bundled_model(tmp_path):
    source = resolve_checkpoint(None)
    rows = calibration_rows(AutoTokenizer.from_pretrained(source.folder), 32, seed=0)
    means = mean_errors(source, tmp_path, rows, 3, 64)
    assert means["gptq"] < 0.95 * means["awq"], means
    assert means["awq"] < means["rtn"], means
    four = produce(source, tmp_path / "gptq4", Recipe("gptq", 4, 64, sym=True), rows)
    assert sum(four.errors.values()) / len(four.errors) < 0.6 * means["gptq"]
