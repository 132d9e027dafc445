"""QUIRE_CACHE_DIR: where the hub's models are kept."""

from __future__ import annotations

import pytest
from quire.errors import ModelNotFound
from quire.loader.checkpoint import resolve_checkpoint


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_models_are_fetched_into_the_named_folder(folder, monkeypatch, tmp_path):
    asked = []

    def download(model, **arguments):
        asked.append((model, arguments["cache_dir"]))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    if folder is None:
        monkeypatch.delenv("QUIRE_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("QUIRE_CACHE_DIR", folder)
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        resolve_checkpoint("some/model")
    assert asked == [("some/model", folder)]
