"""Rows that are read from the checkpoint's file instead of being held in memory."""

import pytest
import torch
from quire import EngineError
from quire.layers import basic
from quire.layers.basic import Embedding
from quire.loader.checkpoint import read_checkpoint
from quire.models import llama, qwen3
from quire.testing.model import ModelConformance, PagedRun
from quire.testing.tiny_models import make_checkpoint, reference_model
from quire_cpu_ref.attention import CpuRefAttention
from quire_cpu_ref.ops import TorchOps
from safetensors.torch import save_file

NAME = "model.embed_tokens.weight"


@pytest.fixture
def checkpoint(tmp_path):
    def make(tensor):
        save_file({"first": torch.arange(5), NAME: tensor, "flat": torch.ones(3)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
        return read_checkpoint("test", tmp_path)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_equal_a_look_up(checkpoint, dtype):
    table = torch.randn(50, 7).to(dtype)
    rows = checkpoint(table).stored_rows(NAME)
    for ids in ([], [49], [0, 49, 3, 3, 0], list(range(50))):
        got = rows(torch.tensor(ids, dtype=torch.long))
        assert got.dtype is dtype
        assert torch.equal(got, table[torch.tensor(ids, dtype=torch.long)])


def test_only_matrices_have_rows(checkpoint):
    assert checkpoint(torch.ones(2, 2)).stored_rows("flat") is None
    with pytest.raises(KeyError):
        checkpoint(torch.ones(2, 2)).stored_rows("absent")


def test_a_file_that_is_cut_short_is_an_error_and_a_replaced_one_is_not_read(checkpoint, tmp_path):
    path = tmp_path / "model.safetensors"
    rows = checkpoint(torch.ones(50, 8)).stored_rows(NAME)
    checkpoint(torch.zeros(50, 8))  # as save_pretrained writes: a new file of the same name
    assert torch.equal(rows(torch.tensor([1])), torch.ones(1, 8))
    rows = checkpoint(torch.ones(50, 8)).stored_rows(NAME)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 200)
    with pytest.raises(EngineError, match=r"model\.safetensors has been cut short"):
        rows(torch.tensor([49]))


@pytest.mark.parametrize(
    ("architecture", "spec", "leaves"), [("qwen3", qwen3.SPEC, True), ("llama", llama.SPEC, False)]
)
def test_a_large_tied_embedding_stays_in_the_file(architecture, spec, leaves, tmp_path, monkeypatch):
    """One that is not tied is held once anyway, and stays in memory."""
    monkeypatch.setattr(basic, "LARGE_TABLE", 1)
    let_go = []
    keep = Embedding.keep_in_file
    monkeypatch.setattr(Embedding, "keep_in_file", lambda self: (keep(self), let_go.append(self.weight.numel() == 0)))
    folder = make_checkpoint(architecture, tmp_path / "model")
    model, backend = ModelConformance().load(folder, spec, (CpuRefAttention, TorchOps))
    assert let_go == ([True] if leaves else [])
    prompt = [3, 5, 5, 8, 250]
    with torch.inference_mode():
        theirs = reference_model(folder)(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(PagedRun(model, backend, [prompt]).feed([5])[0], theirs, atol=1e-4, rtol=0)
