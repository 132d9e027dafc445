"""Finds a checkpoint and reads what it says about itself. Weights are not touched here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quire.config import special_variable
from quire.errors import ConfigError, ModelNotFound, UnsupportedModel
from quire.loader.files import StoredTensor, index_tensors
from quire.loader.rows import StoredRows, can_read_rows

BUNDLED = "quire-tiny"
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt")
"""What is fetched from the hub: weights in safetensors, configuration, tokenizer, chat template."""
IGNORED = ("consolidated*.safetensors", "*/*.safetensors")
"""The same weights once more, in other layouts, which some repositories hold beside the usual files."""
OLDER_QUANTIZATION = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""File of quantization settings -> the method whose tools write it."""
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        name: what the user called it. folder: where it is.
        config: config.json. generation_config: generation_config.json, or empty.
        tensors: name -> where it is stored, with shape and dtype.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def quantization_config(self) -> Mapping[str, Any]:
        """How the weights are quantized; empty if they are not."""
        return self.config.get("quantization_config") or self.config.get("compression_config") or {}

    @property
    def quant_method(self) -> str | None:
        """The name of the format of the weights; None if they are not quantized."""
        settings = self.quantization_config
        named = settings.get("quant_method") or settings.get("method")  # GPTQModel calls it both
        return str(named) if named else "compressed-tensors" if settings.get("config_groups") else None

    @property
    def dtype_name(self) -> str:
        """The dtype that config.json names, or that of the weights."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if named:
            return str(named).removeprefix("torch.")
        floating = (tensor.dtype for tensor in self.tensors.values() if tensor.dtype.is_floating_point)
        return str(next(floating, torch.float32)).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def stored_rows(self, name: str) -> StoredRows | None:
        """What reads rows of that matrix from its file; None if nothing can. Raises KeyError for a name unknown."""
        stored = self.tensors[name]
        return StoredRows(stored) if can_read_rows(stored) else None


def bundled_folder() -> Path:
    """Where quire-tiny is installed."""
    return Path(__file__).parent.parent / "assets" / "quire_tiny"


def resolve_checkpoint(model: str | None, revision: str | None = None) -> Checkpoint:
    """The checkpoint of a folder, of a Hugging Face id (downloaded if need be), or the bundled one for None.

    Raises:
        ModelNotFound: there is none, or it may not be read.
        ConfigError: the folder is incomplete or damaged.
    """
    if model is None or model == BUNDLED:
        return read_checkpoint(BUNDLED, bundled_folder())
    path = Path(model).expanduser()
    if path.is_dir():
        return read_checkpoint(model, path)
    if path.exists():
        raise ModelNotFound(f"{model} is a file, not a checkpoint's folder", remedy="name the folder that holds it")
    if not HUB_ID.fullmatch(model) or model.startswith((".", "/")):
        raise ModelNotFound(
            f"there is no folder {model}", remedy="name a folder, or a Hugging Face id such as org/name"
        )
    return read_checkpoint(model, download(model, revision))


def read_checkpoint(name: str, folder: Path) -> Checkpoint:
    """Read a folder's configuration and index its tensors."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelNotFound(f"{folder} has no config.json", remedy="name the folder of a Hugging Face checkpoint")
    config = read_json(config_path)
    if not config.get("architectures"):
        raise UnsupportedModel(f"{config_path} names no 'architectures'", remedy="the checkpoint is incomplete")
    if not config.get("quantization_config"):
        config |= _older_quantization(folder)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return Checkpoint(name, folder, config, generation, index_tensors(folder))


def _older_quantization(folder: Path) -> dict[str, Any]:
    """Quantization settings in a file of their own, as tools wrote them before config.json had a place for them."""
    for file_name, method in OLDER_QUANTIZATION.items():
        if (folder / file_name).is_file():
            return {"quantization_config": {"quant_method": method} | read_json(folder / file_name)}
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}", remedy="fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def download(model: str, revision: str | None, patterns: Sequence[str] = PATTERNS) -> Path:
    """Fetch a snapshot through huggingface_hub, which honours its own token and HF_HUB_OFFLINE.

    Raises ModelNotFound.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        cache = special_variable("QUIRE_CACHE_DIR")
        return Path(
            snapshot_download(
                model, revision=revision, cache_dir=cache, allow_patterns=list(patterns), ignore_patterns=list(IGNORED)
            )
        )
    except errors.HFValidationError as error:
        raise ModelNotFound(
            f"{model} is neither a folder nor a name that the hub allows",
            remedy="name a folder, or an id such as org/name",
        ) from error
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"access to {model} is restricted", remedy="accept its licence on the hub and run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{model} has no revision {revision!r}", remedy="leave revision out, or correct it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the hub has no model {model}, or it is private", remedy="check the spelling, or run `hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelNotFound(
            f"{model} is neither a folder nor in the local cache, and the hub cannot be reached",
            remedy="go online, unset HF_HUB_OFFLINE, or name a local folder",
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelNotFound(
            f"{model} could not be fetched: {error}", remedy="try again, or name a local folder"
        ) from error
