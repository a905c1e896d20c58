"""Reads a checkpoint into the tensors that the embedded engine computes with."""

from __future__ import annotations

from pathlib import Path

import torch

from services.sampler.engines.checkpoint import read_tensors
from services.sampler.engines.embedded.architecture import Architecture

Weights = dict[str, torch.Tensor]


def read_weights(path: Path, architecture: Architecture) -> Weights:
    """All tensors of the checkpoint in ``path`` as float32, by Hugging Face name. Raises WeightsError (`read_tensors`)."""
    # A copy, because what safetensors returns lies in the file, which may be replaced while the model runs.
    return {
        name: tensor.to(torch.float32, copy=True)
        for name, tensor in read_tensors(path, architecture.tensors(), tied=architecture.tied)
    }
