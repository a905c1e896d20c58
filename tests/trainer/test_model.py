from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.trainer.algorithm.credit_assignment import Credit, CreditedTree
from learner.trainer.packing import attention
from learner.trainer.packing import model as module
from learner.trainer.packing.layout import lay_out
from learner.trainer.packing.model import load_model, score
from learner.trainer.packing.packing import Pack, empty_pack, pack
from tests.trainer.builders import CPU, STOP, VOCABULARY, forked, grown, random_group, tiny, write_tiny
from tests.trainer.model_families import FAMILIES, write_family
from treegrpo.errors import ModelError


@pytest.fixture
def policy(tmp_path: Path) -> PreTrainedModel:
    return tiny(tmp_path / "model")


def packs_of_random_trees(budget: int = 120, seed: int = 1, vocabulary: int = VOCABULARY) -> list[Pack]:
    trees = random_group(np.random.default_rng(seed), trees=3, vocabulary=vocabulary).trees.values()
    credited = [CreditedTree(t, {leaf: Credit(0.1, np.ones(len(t.path(leaf))), 0.0, 0.0) for leaf in t.leaves}) for t in trees]
    return pack(credited, budget, keep_zero=True)


def plain_logprobs(folder: Path, one: Pack, temperature: float) -> Tensor:
    """What the model as transformers loads it says of every path by itself: log-probabilities of all tokens of the vocabulary."""
    policy = cast("Any", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    rows: list[Tensor] = []
    with torch.no_grad():
        for at in one.predictor_A.tolist():
            seen = [j for j in range(at + 1) if at < one.layout.end_T[j]]
            rows.append(policy(input_ids=one.ids_T[seen][None]).logits[0, -1])
    return torch.log_softmax(torch.stack(rows) / temperature, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_scores_are_those_of_each_path_by_itself(tmp_path: Path, family: str, temperature: float) -> None:
    folder = write_family(tmp_path / "model", family)
    policy = load_model(folder, CPU)
    for one in packs_of_random_trees():
        logprob_A, entropy_A = score(policy, one, temperature)
        expected_AV = plain_logprobs(folder, one, temperature)
        assert torch.allclose(logprob_A, expected_AV.gather(-1, one.targets.label_A[:, None])[:, 0], atol=2e-6)
        assert torch.allclose(entropy_A, -(expected_AV.exp() * expected_AV).sum(-1), atol=1e-5)


def gradients(policy: PreTrainedModel, one: Pack) -> list[Tensor]:
    logprob_A, entropy_A = score(policy, one, 1.0, entropy_grad=True)
    return list(torch.autograd.grad((logprob_A.square() - entropy_A).sum(), list(policy.parameters())))


def test_chunks_give_the_same_scores_and_gradients(policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = packs_of_random_trees(10_000)
    whole, of_whole = score(policy, one, 1.0), gradients(policy, one)
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", VOCABULARY * 3)
    for a, b in zip(whole, score(policy, one, 1.0), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(of_whole, gradients(policy, one), strict=True))


def test_no_more_than_a_chunk_of_logits_is_made_at_a_time_and_none_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, (one,) = load_model(write_family(tmp_path / "model", "llama"), CPU), packs_of_random_trees(10_000)
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", VOCABULARY * 5)
    made, kept = list[int](), list[Tensor]()
    cast("nn.Module", policy.get_output_embeddings()).register_forward_hook(lambda _m, _i, out: made.append(len(out)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        score(policy, one, 1.0)[0].sum().backward()
    assert sum(made) == 2 * len(one.targets.label_A)
    assert max(made) == 5
    assert not [t for t in kept if t.shape[-1:] == (VOCABULARY,) and t.shape != (32, VOCABULARY)]  # the other one is the head


def test_the_entropy_has_a_gradient_only_if_asked(policy: PreTrainedModel) -> None:
    (one,) = packs_of_random_trees(10_000)
    assert not score(policy, one, 1.0)[1].requires_grad
    assert score(policy, one, 1.0, entropy_grad=True)[1].requires_grad


def test_layers_computed_again_give_the_same_gradients_and_keep_less(tmp_path: Path) -> None:
    folder, (one,) = write_tiny(tmp_path / "model"), packs_of_random_trees(10_000)
    kept: list[int] = []
    found: list[list[Tensor]] = []
    for again in (False, True):
        policy, total = load_model(folder, CPU, gradient_checkpointing=again), list[int]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=total: n.append(t.numel()) or t, lambda t: t):
            scored = score(policy, one, 1.0)[0]
        kept.append(sum(total))
        found.append(list(torch.autograd.grad(scored.square().sum(), list(policy.parameters()))))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_computed_again_have_no_randomness(tmp_path: Path, family: str) -> None:
    """OPT and BioGPT have dropout and skip layers in training mode, which transformers asks for here."""
    folder, (one,) = write_family(tmp_path / "model", family), packs_of_random_trees(10_000)
    plain, again = (load_model(folder, CPU, gradient_checkpointing=asked) for asked in (False, True))
    assert not [name for name, part in again.named_modules() if part.training]
    for _ in range(2):
        assert torch.equal(score(again, one, 1.0)[0], score(plain, one, 1.0)[0])
    found, wanted = gradients(again, one), gradients(plain, one)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def test_bfloat16_computes_close_to_float32_and_keeps_float32_weights(policy: PreTrainedModel) -> None:
    (one,) = packs_of_random_trees(10_000)
    exact, rough = score(policy, one, 1.0)[0], score(policy, one, 1.0, "bfloat16")[0]
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.1
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_gradients_in_bfloat16_are_close_whatever_the_number_of_chunks(
    tmp_path: Path, family: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (one,) = write_family(tmp_path / "model", family), packs_of_random_trees(10_000)
    policy = load_model(folder, CPU, gradient_checkpointing=again)
    exact = gradients(policy, one)
    for rows in (1000, 1):
        monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", VOCABULARY * rows)
        logprob_A, entropy_A = score(policy, one, 1.0, "bfloat16", entropy_grad=True)
        rough = torch.autograd.grad((logprob_A.square() - entropy_A).sum(), list(policy.parameters()))
        gaps = [(a - b).norm() for a, b in zip(rough, exact, strict=True)]
        assert torch.stack(gaps).norm() < 0.02 * torch.stack([g.norm() for g in exact]).norm()


def test_an_empty_pack_has_gradients_of_zero(policy: PreTrainedModel) -> None:
    """Every parameter takes part, or ranks would wait for each other for ever."""
    scored, entropy = score(policy, empty_pack(), 1.0)
    assert (len(scored), len(entropy)) == (0, 0)
    scored.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_a_token_that_is_also_the_pad_token_learns_its_embedding(policy: PreTrainedModel) -> None:
    """After the stop token the episode goes on: its input embedding then matters to what follows."""
    tree = grown(forked(prompt=(1, STOP, 3)))
    (one,) = pack([CreditedTree(tree, {2: Credit(1.0, np.ones(2), 0.0, 0.0)})], 100, keep_zero=False)
    embedded: list[Tensor] = []
    hook = policy.get_input_embeddings().register_forward_hook(lambda _m, _i, out: embedded.append(out) or out.retain_grad())
    score(policy, one, 1.0)[0].sum().backward()
    hook.remove()
    through_input = embedded[0].grad
    assert through_input is not None
    assert through_input[0, 1].abs().sum() > 0
    assert cast("Any", policy.get_input_embeddings()).padding_idx is None


@pytest.mark.parametrize(
    ("family", "reason"), [("qwen2_sliding", "sliding_attention"), ("mistral_sliding", "see a window"), ("dynamic", "dynamic")]
)
def test_windows_and_moving_positions_are_refused_however_wide(tmp_path: Path, family: str, reason: str) -> None:
    folder = write_family(tmp_path / "model", family)
    with pytest.raises(ModelError, match=rf"{reason}.*; trees need full attention"):
        load_model(folder, CPU)


def test_positions_that_are_scaled_once_and_for_all_are_fine(tmp_path: Path) -> None:
    assert load_model(write_family(tmp_path / "model", "linear"), CPU)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("granite_scaled", "scales or caps its logits"),
        ("cohere_scaled", "scales or caps its logits"),
        ("gemma3_capped", "scales or caps its logits"),
    ],
)
def test_scalings_and_caps_are_refused_however_slight(tmp_path: Path, family: str, reason: str) -> None:
    folder = write_family(tmp_path / "model", family)
    with pytest.raises(ModelError, match=rf"{reason}.*; choose another kind\.$"):
        load_model(folder, CPU)


def test_a_layer_that_asks_for_more_than_attention_is_refused() -> None:
    q_1HTD, layout = torch.ones(1, 2, 4, 8), lay_out([np.arange(4, dtype=np.uint32)], [0])[0]
    for name in attention.UNSUPPORTED:
        with pytest.raises(ModelError, match=rf"its layers ask for .* \({name}\)"):
            attention.attend(nn.Module(), q_1HTD, q_1HTD, q_1HTD, None, layout=layout, **{name: 1.0})
        attention.attend(nn.Module(), q_1HTD, q_1HTD, q_1HTD, None, layout=layout, **{name: None})


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; give a Hugging Face causal LM"):
        load_model(tmp_path, CPU)
    whole = write_tiny(tmp_path / "model")
    weights = whole / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors does not exist"):
        load_model(whole, CPU)
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_model(whole, CPU)


def test_weights_that_two_readers_would_read_differently_are_refused(tmp_path: Path) -> None:
    weights = write_family(tmp_path / "model", "qwen2") / "model.safetensors"
    tensors = load_file(weights)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, weights, {"format": "pt"})
    policy = cast("Any", load_model(weights.parent, CPU))
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight
    save_file({**tensors, "lm_head.weight": head * 1.01}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight unlike model\.embed_tokens\.weight.*tie_word_embeddings = true"):
        load_model(weights.parent, CPU)


def test_weights_that_are_not_finite_or_quantised_are_refused(tmp_path: Path) -> None:
    weights = write_family(tmp_path / "model", "qwen2") / "model.safetensors"
    tensors, name = load_file(weights), "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: torch.full_like(tensors[name], torch.inf)}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} in .* has values that are not finite"):
        load_model(weights.parent, CPU)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"quantised weights \({name} is I8\)"):
        load_model(weights.parent, CPU)


def test_a_model_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}))
    with pytest.raises(ModelError, match=r"lack \d+ tensors, model\.layers\.2"):
        load_model(folder, CPU)
