"""Samples one token per row from its full softmax."""

from __future__ import annotations

import torch


def sample_tokens(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B] ids, [B] log-probabilities): ids from softmax(logits / temperature), the argmax where temperature is 0.

    ``uniform_B`` (float64) are uniform random numbers in [0, 1): a row's outcome depends on its own alone. The
    log-probability is that of the distribution drawn from, at temperature 1 for the argmax. Inversion of the cumulated
    distribution needs one such number a row; the Gumbel trick, like torch.multinomial, needs one per vocabulary entry:
    1.4 ms against 0.1 ms for 32 rows of 2,048, where the whole forward pass takes 4 ms.
    """
    greedy_B = temperature_B == 0
    probability_BV = torch.softmax(logits_BV / torch.where(greedy_B, 1.0, temperature_B)[:, None], dim=-1)
    if bool(greedy_B.all()):
        ids_B = probability_BV.argmax(-1)
    else:
        ids_B = _invert_cumulated(probability_BV, uniform_B)
        if bool(greedy_B.any()):
            ids_B = torch.where(greedy_B, probability_BV.argmax(-1), ids_B)
    return ids_B, probability_BV.gather(1, ids_B[:, None])[:, 0].log()


def _invert_cumulated(probability_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    # float64, so that small probabilities are not lost in the sum; right=True never picks an entry of probability 0.
    cumulated = probability_BV.cumsum(-1, dtype=torch.float64)
    point = uniform_B[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, point, right=True)[:, 0].clamp_(max=probability_BV.shape[1] - 1)
