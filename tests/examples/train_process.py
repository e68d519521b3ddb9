"""What the processes of tests/test_train_processes.py run: a few updates, and the weights they end with."""

import sys
from pathlib import Path

import torch
from recipes.pictures import Data, Decoded
from recipes.recipe import Recipe
from recipes.training import train
from torch import nn

import nmconv

SAMPLING = {"sampling": True, "seed": 5, "end": 0.9}


def data():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 8, 8, 3), dtype=torch.uint8, generator=draw)
    labels = torch.arange(40) % 3
    return Data(Decoded(images, labels), Decoded(images[:7], labels[:7]), ("a", "b", "c"))


def network(dtype):
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(8, 3)).to(dtype)


def trained(dtype, gradual=None, **recipe):
    """The weights after six updates of 12 pictures, and the log; with options of a `Gradual` that drops the ReLU."""
    model = network(dtype)
    if gradual is not None:
        plan = nmconv.make_plan(model, "2:1", example_inputs=torch.zeros(1, 3, 8, 8, dtype=dtype))
        model = nmconv.apply_plan(model, plan.edit({plan.sites[0].id: "drop"}), gradual=True)
    log = train(model, data(), Recipe(epochs=2, batch_size=12, lr=0.1, seed=3, **recipe), device="cpu", gradual=gradual)
    return model.state_dict(), log


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found = {}
    for dtype in (torch.float32, torch.float64):
        for accumulate in (1, 2):
            state, log = trained(dtype, accumulate=accumulate)
            found[f"{dtype} {accumulate}"] = {"state": state, "losses": log["losses"], "curve": log["curve"]}
    state, log = trained(torch.float64, SAMPLING)
    found["sampling"] = {"state": state}
    if torch.distributed.get_rank() == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()
