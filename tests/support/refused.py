"""Models that are refused where a plain one is wanted, and what the error says."""

import copy
import warnings

import torch
from torch import nn


def not_plain(model, images):
    """Pairs of something else than a plain model, made of one, and a part of the message."""
    compiled = copy.deepcopy(model)
    compiled.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(model, images)
    return (
        (torch.compile(model), "the model is a OptimizedModule"),
        (compiled, "the model is compiled"),
        (scripted, "the model is scripted"),
        (nn.DataParallel(model), "the model is a DataParallel"),
        (nn.Sequential(nn.LazyConv2d(3, 3), nn.ReLU()), "without weights yet"),
        ("resnet", "str is not an nn.Module"),
    )
