"""Finding and reading checkpoints: what is right loads, what is wrong is named with its remedy."""

import json
import struct

import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from quire import ConfigError, ModelNotFound, QuireError, UnsupportedModel
from quire.loader import checkpoint as checkpoint_module
from quire.loader import files
from quire.loader.checkpoint import read_checkpoint, resolve_checkpoint
from quire.loader.files import INDEX, SINGLE, read_header, read_tensors
from safetensors.torch import load_file, save_file

CONFIG = {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / SINGLE)
    return tmp_path


def shard(folder, placement):
    """Two shards with an index that says `placement`."""
    (folder / SINGLE).unlink(missing_ok=True)
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": placement}))


def test_single_file(folder):
    checkpoint = read_checkpoint("x", folder)
    assert {name: (t.shape, t.dtype) for name, t in checkpoint.tensors.items()} == {
        "a": ((2, 3), torch.float32),
        "b": ((4,), torch.bfloat16),
    }
    assert checkpoint.num_bytes == 24 + 8
    loaded = {name: tensor.clone() for name, tensor in read_tensors(checkpoint.tensors)}
    assert torch.equal(loaded["a"], torch.arange(6.0).view(2, 3))


def test_shards(folder):
    shard(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    checkpoint = read_checkpoint("x", folder)
    assert {name: tensor.tolist() for name, tensor in read_tensors(checkpoint.tensors)} == {"a": [0, 0], "b": [1, 1, 1]}


def test_files_are_mapped_in_portions(folder, monkeypatch):
    monkeypatch.setattr(files, "MAPPED_BYTES", 20)
    opened = []
    real = files.safe_open
    monkeypatch.setattr(files, "safe_open", lambda *a, **k: opened.append(a) or real(*a, **k))
    checkpoint = read_checkpoint("x", folder)
    assert [name for name, _ in read_tensors(checkpoint.tensors)] == ["a", "b"]
    assert len(opened) == 2


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, ["three.safetensors", "missing"]),
        ({"a": "two.safetensors", "b": "two.safetensors"}, ["'a'"]),
        ({"a": "one.safetensors", "b": "one.safetensors"}, ["'b'"]),
        ({"a": "../one.safetensors"}, ["outside"]),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, ["'c'"]),
    ],
)
def test_an_index_that_lies_is_caught(folder, placement, words):
    shard(folder, placement)
    with pytest.raises(ConfigError) as caught:
        read_checkpoint("x", folder)
    assert all(word in str(caught.value) for word in words)


def test_a_tensor_in_two_shards_is_caught(folder):
    shard(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, folder / "two.safetensors")
    with pytest.raises(ConfigError, match="'a'"):
        read_checkpoint("x", folder)


def test_pickles_are_refused_by_content_and_by_name(folder):
    torch.save({"a": torch.zeros(1)}, folder / SINGLE)
    with pytest.raises(UnsupportedModel, match="pickle"):
        read_checkpoint("x", folder)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin.*convert"):
        read_checkpoint("x", folder)


def header_file(path, header, size=None, data=b"\0" * 64):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if size is None else size) + raw + data)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b"[1, 2]",
        b"{not json",
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"shape": [1]}}',
        b"[" * 5000,
    ],
)
def test_damaged_headers_are_named(folder, header):
    header_file(folder / SINGLE, header)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        read_checkpoint("x", folder)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_flipped_bytes_give_typed_errors_only(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.ones(4, dtype=torch.int8)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else bytes(raw))
    try:
        for _ in read_tensors(read_header(path)):
            pass
    except QuireError:
        pass


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f: (f / "config.json").unlink(), ModelNotFound, ["config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ConfigError, ["config.json", "JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), ConfigError, ["object"]),
        (lambda f: (f / "config.json").write_text("{}"), UnsupportedModel, ["architectures"]),
        (lambda f: (f / SINGLE).unlink(), ConfigError, ["safetensors"]),
    ],
)
def test_incomplete_folders_are_named(folder, change, error, words):
    change(folder)
    with pytest.raises(error) as caught:
        read_checkpoint("x", folder)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "a/b/c", "org/../secret", "what is this?", "~/nothing"]
)
def test_names_that_can_be_neither_folder_nor_id(name, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "download", lambda *args: pytest.fail("the hub was asked"))
    with pytest.raises(ModelNotFound):
        resolve_checkpoint(name)


@pytest.mark.parametrize("name", ["org/a--b", "org/a..b", "org/name-", "a" * 97])
def test_ids_that_the_hub_would_not_allow(name):
    with pytest.raises(ModelNotFound, match="a name that the hub allows"):
        resolve_checkpoint(name)


def hub_error(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "told by the hub")
    return error


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (errors.GatedRepoError, "licence"),
        (errors.RepositoryNotFoundError, "spelling"),
        (errors.RevisionNotFoundError, "revision"),
        (errors.LocalEntryNotFoundError, "online"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError, "try again"),
        (OSError, "try again"),
    ],
)
def test_what_the_hub_says_becomes_one_line_with_a_remedy(monkeypatch, kind, word):
    def fail(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelNotFound) as caught:
        resolve_checkpoint("org/model", "v9")
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_the_hub_is_asked_for_safe_files_only(monkeypatch, folder):
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint = resolve_checkpoint("org/model", "v9")
    assert (checkpoint.name, asked["repo"], asked["revision"]) == ("org/model", "org/model", "v9")
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["allow_patterns"])
    files = ["model-00001-of-00002.safetensors", "consolidated.safetensors", "onnx/model.safetensors", "a.py", "b.bin"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:1]


def test_the_bundled_model_is_there():
    checkpoint = resolve_checkpoint(None)
    assert checkpoint.name == "quire-tiny"
    assert sum(file.stat().st_size for file in checkpoint.folder.iterdir()) <= 6 * 1024 * 1024
    assert load_file(checkpoint.folder / SINGLE)
