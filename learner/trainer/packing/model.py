"""The policy: a Hugging Face causal LM, and the log-probabilities it gives to the action tokens of a pack."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.trainer.packing import attention
from learner.trainer.packing.layout import Layout, lay_out
from learner.trainer.packing.model_support import check_trainable
from learner.trainer.packing.packing import Pack
from treegrpo.config.schema import Dtype
from treegrpo.errors import ModelError, WeightsError, describe
from treegrpo.storage.model_config import read_model_config
from treegrpo.storage.weight_files import check_head, check_plain_numbers, read_heads

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Logits that exist at a time, in float32: 16 MB, which a cache can hold, and 1 GB, which keeps the head's products large."""
TOLERANCE = 1e-3
"""Of a logit in `_check_tree_logits` relative to the largest: rounding stays below, other attention or positions do not."""


class Policy(nn.Module):
    """A causal LM as the trainer sees it: a pack in, log-probabilities of its action tokens out."""

    def __init__(self, causal: PreTrainedModel, temperature: float = 1.0, dtype: Dtype = "float32") -> None:
        """Args:
        causal: the model, as `load_model` gives it.
        temperature: the sampler's.
        dtype: what is computed in; weights stay as they are.
        """
        super().__init__()
        self.causal = causal
        self._temperature = temperature
        self._dtype: Dtype = dtype

    def forward(self, pack: Pack, *, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """`score` of ``pack``, which is on the model's device."""
        return score(self.causal, pack, self._temperature, self._dtype, entropy_grad=entropy_grad)


def load_model(folder: Path, device: torch.device, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Read a model directory; weights become float32 for the optimiser.

    Args:
        folder: a Hugging Face directory.
        device: where the model goes.
        gradient_checkpointing: compute a layer again in the backward pass instead of keeping what it made.

    Raises:
        ModelError: there is no config or no weights, they cannot be read or do not belong together, or the model
            computes something else on a tree than on its paths.
    """
    read_model_config(folder)
    try:
        tensors = read_heads(folder)
        check_plain_numbers(tensors)
    except WeightsError as error:
        raise ModelError(str(error)) from error
    try:
        loaded, info = cast("Any", AutoModelForCausalLM).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:  # a broken file surfaces as any of a dozen types
        raise ModelError(
            f"The model in {folder} cannot be loaded ({describe(error)}); if its files are whole, choose another kind."
        ) from error
    try:
        check_head(tensors, folder, tied=bool(loaded.config.tie_word_embeddings))
    except WeightsError as error:
        raise ModelError(str(error)) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"The weights in {folder} lack {len(missing)} tensors, {missing[0]} first; restore them.")
    if broken := next((name for name, weight in loaded.named_parameters() if not torch.isfinite(weight).all()), ""):
        raise ModelError(f"{broken} in {folder} has values that are not finite; restore it from where it came.")
    model = cast("PreTrainedModel", loaded)
    check_trainable(model.config, folder)
    # Nothing here is padding, and a token that is also the pad token must learn its embedding like any other.
    cast("Any", model.get_input_embeddings()).padding_idx = None
    # Dropout, skipped layers and router noise would make the trained policy another one than the sampled one.
    cast("nn.Module", model.eval()).to(device)
    _check_tree_logits(model, folder)
    if gradient_checkpointing:
        checkpoint_layers(model)
    return model


def checkpoint_layers(model: nn.Module) -> None:
    """Have every decoder layer computed again in the backward pass, in evaluation mode.

    transformers does it in training mode alone, in which some families (OPT, BioGPT) apply dropout or skip whole layers.
    No module of a policy is ever in training mode: the policy that is trained is the one that was sampled.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def _check_tree_logits(model: PreTrainedModel, folder: Path) -> None:
    """Compare two paths and their tree: whether the model takes attention and positions as a pack gives them.

    Raises:
        ModelError: it does not, having soft-capped logits, scaled ones, or positions of its own making.
    """
    device, whole = next(model.parameters()).device, cast("Any", model)
    paths = [np.array(ids, np.uint32) % whole.config.vocab_size for ids in ([1, 2, 0, 4], [1, 2, 3, 4, 5, 6])]
    layout, places = lay_out(paths, [0, 2])
    with torch.no_grad():
        alone = [_plain_logits(model, torch.from_numpy(path.astype(np.int64)).to(device), folder) for path in paths]
        model.set_attn_implementation(attention.NAME)
        try:
            ids_T, position_T = (torch.from_numpy(of_T).to(device) for of_T in (layout.ids_T, layout.position_T))
            hidden_TH = _hidden(model, ids_T, position_T, layout)
            together_TV = cast("nn.Module", model.get_output_embeddings())(hidden_TH)
        except Exception as error:  # a model may fail in any way if it does not pass the layout on
            raise ModelError(
                f"The model in {folder} cannot be trained on trees ({type(error).__name__}: {describe(error)}); "
                "choose another kind."
            ) from error
    gap = max((together_TV[place] - one).abs().max().item() for place, one in zip(places, alone, strict=True))
    if not gap <= TOLERANCE * max(one.abs().max().item() for one in alone):
        raise ModelError(
            f"The model in {folder} computes something else on a tree than on its paths (logits differ by {gap:.2g}); "
            "trees need positions that can be given and full attention: choose another kind."
        )


def _plain_logits(model: PreTrainedModel, ids_T: Tensor, folder: Path) -> Tensor:
    """logits_TV of one path, which are what the output matrix makes of the decoder's last hidden states, bit for bit.

    Raises:
        ModelError: the model scales or caps them before or after, which `score` would leave out.
    """
    whole, head = cast("Any", model), cast("nn.Module", model.get_output_embeddings())
    seen: list[tuple[Tensor, Tensor]] = []

    def saw(_module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen.append((given[0], made))

    hook = cast("Any", head).register_forward_hook(saw)
    try:
        logits = whole(input_ids=ids_T[None], use_cache=False).logits
    finally:
        hook.remove()
    decoded = whole.get_decoder()(input_ids=ids_T[None], use_cache=False).last_hidden_state
    (given, made), *_ = seen or [(decoded, head(decoded))]
    if not (torch.equal(given, decoded) and torch.equal(made, logits)):
        raise ModelError(
            f"The model in {folder} scales or caps its logits, which training does not compute; choose another kind."
        )
    return logits[0]


def score(
    model: PreTrainedModel, pack: Pack, temperature: float, dtype: Dtype = "float32", *, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy in nats of every action token of ``pack``.

    They are those of log_softmax(logits / ``temperature``), the distribution the sampler draws from. Only the hidden
    states that predict an action token meet the vocabulary, a chunk at a time; a backward pass makes each chunk's
    logits again instead of keeping them.

    Returns:
        logprob_A, entropy_A: at least float32; the entropy has a gradient if ``entropy_grad``.
    """
    with torch.autocast(pack.ids_T.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden_TH = _hidden(model, pack.ids_T, pack.position_T, pack.layout)
        hidden_AH = hidden_TH.index_select(0, pack.predictor_A)
        return score_hidden(model, hidden_AH, pack.targets.label_A, temperature, entropy_grad=entropy_grad)


def score_hidden(
    model: PreTrainedModel, hidden_AH: Tensor, label_A: Tensor, temperature: float, *, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """The second half of `score`: from the last hidden state before each action token to its log-probability."""
    head, kind = cast("nn.Module", model.get_output_embeddings()), hidden_AH.device.type
    size = max(1, CHUNK_ELEMENTS[kind] // int(cast("Any", model.config).vocab_size))
    parts = list(zip(hidden_AH.split(size), label_A.split(size), strict=True))
    again = torch.is_grad_enabled() and len(parts) > 1
    # A cached bfloat16 copy of the head would also add up the chunks' gradients in bfloat16, and lose some.
    with torch.autocast(kind, torch.bfloat16, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
        scored = [_chunk(head, hidden, label, temperature, entropy_grad, again=again) for hidden, label in parts]
    return torch.cat([logprob for logprob, _ in scored]), torch.cat([entropy for _, entropy in scored])


def _hidden(model: PreTrainedModel, ids_T: Tensor, position_T: Tensor, layout: Layout) -> Tensor:
    """hidden_TH: the last hidden states of a pack."""
    decoder = cast("nn.Module", cast("Any", model).get_decoder())
    attended = attention.prepare_layout(layout, ids_T.device)
    return decoder(input_ids=ids_T[None], position_ids=position_T[None], layout=attended, use_cache=False).last_hidden_state[0]


def _chunk(
    head: nn.Module, hidden: Tensor, label: Tensor, temperature: float, entropy_grad: bool, *, again: bool
) -> tuple[Tensor, Tensor]:
    if not again:
        return _score(head, hidden, label, temperature, entropy_grad)
    made = checkpoint(_score, head, hidden, label, temperature, entropy_grad, use_reentrant=False, preserve_rng_state=False)
    return cast("tuple[Tensor, Tensor]", made)


def _score(head: nn.Module, hidden_CH: Tensor, label_C: Tensor, temperature: float, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    logits_CV: Tensor = head(hidden_CH)
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    logprob_CV = torch.log_softmax(logits_CV.to(wide) / temperature, dim=-1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy_C = -(logprob_CV.exp() * logprob_CV).sum(-1)
    return logprob_CV.gather(-1, label_C[:, None])[:, 0], entropy_C
