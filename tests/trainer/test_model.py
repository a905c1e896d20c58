from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.trainer import model as module
from learner.trainer.episodes import Credit, CreditedTree
from learner.trainer.model import load_model, score
from learner.trainer.packing import Pack, pack
from tests.trainer.builders import CPU, STOP, forked, grown, random_group, tiny, write_tiny
from treegrpo.errors import ModelError


@pytest.fixture
def policy(tmp_path: Path) -> PreTrainedModel:
    return tiny(tmp_path / "model")


def packs_of_random_trees(budget: int = 120) -> list[Pack]:
    trees = random_group(np.random.default_rng(1), trees=3).trees.values()
    credited = [CreditedTree(tree, {leaf: Credit(1.0, 0.1) for leaf in tree.leaves}) for tree in trees]
    return pack(credited, budget, keep_zero=True)


def plain_logprobs(policy: PreTrainedModel, one: Pack, temperature: float) -> Tensor:
    """What the model's own forward says, row by row without padding being looked at."""
    logits = cast("Any", policy)(input_ids=one.ids_RS).logits.flatten(0, 1)
    return torch.log_softmax(logits / temperature, -1)[one.predictor_A]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_the_tempered_softmax(policy: PreTrainedModel, temperature: float) -> None:
    for one in packs_of_random_trees():
        logprob_A, entropy_A = score(policy, one, temperature)
        expected_AV = plain_logprobs(policy, one, temperature)
        assert torch.allclose(logprob_A, expected_AV.gather(-1, one.label_A[:, None])[:, 0], atol=1e-6)
        assert torch.allclose(entropy_A, -(expected_AV.exp() * expected_AV).sum(-1), atol=1e-5)


def test_padding_changes_nothing(policy: PreTrainedModel) -> None:
    (together,), alone = packs_of_random_trees(10_000), packs_of_random_trees(8)
    assert together.ids_RS.shape[0] == len(alone) > 1
    apart_A = torch.cat([score(policy, one, 1.0)[0] for one in alone])
    assert torch.allclose(score(policy, together, 1.0)[0], apart_A, atol=1e-6)


def test_chunks_give_the_same_scores_and_gradients(policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = packs_of_random_trees(10_000)
    found: list[tuple[Tensor, list[Tensor]]] = []
    for elements in (1 << 22, 64 * 3):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        logprob_A, _ = score(policy, one, 1.0)
        found.append((logprob_A.detach(), list(torch.autograd.grad(logprob_A.square().sum(), list(policy.parameters())))))
    (whole, of_whole), (chunked, of_chunks) = found
    assert torch.allclose(whole, chunked, atol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(of_whole, of_chunks, strict=True))


def test_bfloat16_computes_close_to_float32_and_keeps_float32_weights(policy: PreTrainedModel) -> None:
    (one,) = packs_of_random_trees(10_000)
    exact, rough = score(policy, one, 1.0)[0], score(policy, one, 1.0, "bfloat16")[0]
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.1
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_a_token_that_is_also_the_pad_token_learns_its_embedding(policy: PreTrainedModel) -> None:
    """After the stop token the episode goes on: its input embedding then matters to what follows."""
    tree = grown(forked(prompt=(1, STOP, 3)))
    (one,) = pack([CreditedTree(tree, {2: Credit(1.0, 1.0)})], 100, keep_zero=False)
    embedded: list[Tensor] = []
    hook = policy.get_input_embeddings().register_forward_hook(lambda _m, _i, out: embedded.append(out) or out.retain_grad())
    score(policy, one, 1.0)[0].sum().backward()
    hook.remove()
    through_input = embedded[0].grad
    assert through_input is not None
    assert through_input[0, 1].abs().sum() > 0
    assert cast("Any", policy.get_input_embeddings()).padding_idx is None


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; give model\.path"):
        load_model(tmp_path, CPU)
    whole = write_tiny(tmp_path / "model")
    weights = whole / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
        load_model(whole, CPU)
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(whole, CPU)


def test_a_model_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}))
    with pytest.raises(ModelError, match=r"lack \d+ tensors, model\.layers\.2"):
        load_model(folder, CPU)
