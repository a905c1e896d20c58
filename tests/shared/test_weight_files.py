from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from treegrpo.errors import WeightsError
from treegrpo.storage.weight_files import check_finite, check_head, check_plain_numbers, read_heads

pytestmark = pytest.mark.pure

EMBEDDING = "model.embed_tokens.weight"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def saved(folder: Path, **tensors: torch.Tensor) -> Path:
    named = {name.replace("__", "."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    """A checkpoint of two files and an index."""
    names = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    for name, file in names.items():
        save_file({name: torch.ones(2, 3)}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    return folder


def test_heads_say_what_the_files_hold(tmp_path: Path) -> None:
    found = read_heads(sharded(tmp_path))
    assert {name: (tensor.dtype, tensor.shape, tensor.size) for name, tensor in found.items()} == {
        "a.weight": ("F32", (2, 3), 24),
        "b.weight": ("F32", (2, 3), 24),
    }


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-2\.safetensors, one of 2 that model\.safetensors\.index\.json lists"):
        read_heads(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(WeightsError, match="is not a safetensors index"):
        read_heads(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_file_that_was_cut_is_named(tmp_path: Path, kept: int) -> None:
    file = saved(tmp_path, a__weight=torch.ones(8)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        read_heads(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_found_in_every_type(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    weight = torch.full((5, 3), 0.5, dtype=dtype)
    assert check_finite(read_heads(saved(tmp_path, a__weight=weight))) == "all values finite"
    weight[4, 2] = value
    with pytest.raises(WeightsError, match=r"a\.weight in .* has values that are not finite"):
        check_finite(read_heads(saved(tmp_path, a__weight=weight)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_smallest_numbers_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    check_finite(read_heads(saved(tmp_path, a__weight=torch.tensor([limits.max, limits.min, limits.tiny, 0.0], dtype=dtype))))


def test_of_a_large_checkpoint_each_tensors_beginning_is_scanned(tmp_path: Path) -> None:
    late, early = torch.ones(64), torch.ones(64)
    late[-1], early[1] = float("nan"), float("nan")
    assert check_finite(read_heads(saved(tmp_path, a__weight=late)), 64) == "the first 64 bytes of each tensor finite"
    with pytest.raises(WeightsError, match="not finite"):
        check_finite(read_heads(saved(tmp_path, a__weight=early)), 64)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.ones(4, 4).to(dtype)
    with pytest.raises(WeightsError, match=r"quantised weights \(a\.qweight is .*\), which cannot be trained"):
        check_plain_numbers(read_heads(saved(tmp_path, a__qweight=weight)))


def test_whole_numbers_that_are_no_weights_are_fine(tmp_path: Path) -> None:
    check_plain_numbers(read_heads(saved(tmp_path, a__weight=torch.ones(2), a__position_ids=torch.arange(4))))


def test_a_tied_model_with_another_head_is_refused(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(3, 2)
    folder = saved(tmp_path, **{EMBEDDING: weight, "lm_head.weight": weight.clone()})
    check_head(read_heads(folder), folder, tied=True)
    saved(tmp_path, **{EMBEDDING: weight, "lm_head.weight": weight + 1})
    with pytest.raises(WeightsError, match=r"an lm_head\.weight unlike model\.embed_tokens\.weight.*set that to false"):
        check_head(read_heads(folder), folder, tied=True)
    check_head(read_heads(folder), folder, tied=False)


def test_a_model_that_is_not_tied_needs_its_head(tmp_path: Path) -> None:
    folder = saved(tmp_path, **{EMBEDDING: torch.ones(3, 2)})
    check_head(read_heads(folder), folder, tied=True)
    with pytest.raises(WeightsError, match=r"has no lm_head\.weight.*set that to true"):
        check_head(read_heads(folder), folder, tied=False)
