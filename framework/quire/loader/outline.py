"""A checkpoint's names, shapes and dtypes where the weights themselves are not at hand."""

from __future__ import annotations

from pathlib import Path

import torch

from quire.errors import QuireError, UnsupportedModel
from quire.loader.checkpoint import (
    BUNDLED,
    HUB_ID,
    Checkpoint,
    download,
    read_checkpoint,
    read_json,
    resolve_checkpoint,
)
from quire.loader.files import StoredTensor

SMALL_FILES = ("*.json",)


def outline(model: str | None, revision: str | None = None) -> Checkpoint:
    """As `resolve_checkpoint`, but for a Hugging Face id no weights are fetched, and a folder may lack them.

    Without files of weights, the tensors are those that transformers would make of config.json; their files cannot
    be opened.

    Raises:
        ModelNotFound: there is none, or it may not be read.
        UnsupportedModel: transformers does not know the architecture, and there are no weights.
    """
    name = model or BUNDLED
    folder = Path(name).expanduser()
    if name == BUNDLED or folder.exists() or not HUB_ID.fullmatch(name):
        if not folder.is_dir() or name == BUNDLED:
            return resolve_checkpoint(model, revision)
    else:
        folder = download(name, revision, SMALL_FILES)
    if any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        return read_checkpoint(name, folder)
    return Checkpoint(name, folder, read_json(folder / "config.json"), {}, _made_by_transformers(folder))


def _made_by_transformers(folder: Path) -> dict[str, StoredTensor]:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    except QuireError:
        raise
    except Exception as error:  # whatever an unknown architecture leads to
        raise UnsupportedModel(
            f"{folder} holds no weights, and transformers cannot make the model of its config.json: {error}",
            remedy="plan with a folder that holds the weights",
        ) from error
    return {
        name: StoredTensor(folder, tuple(parameter.shape), parameter.dtype, 0)
        for name, parameter in model.named_parameters()
    }
