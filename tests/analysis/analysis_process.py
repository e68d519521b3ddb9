"""One of the two processes of ``test_two_processes``; in a file of its own, since each process imports it anew."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import nmconv

X = torch.randn(10, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def small() -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for channels, act in ((3, nn.ReLU(True)), (4, nn.SiLU())):
        layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), act]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = small().eval()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with nmconv.ActivationRecorder(model, every=2, example_inputs=X) as recorder:
            for at in range(4):
                if at != 2:
                    wrapped(X[:3] if rank else X[3:]).sum().backward()
                elif rank == 0:  # a process may see nothing
                    model(X[3:])
                recorder.step()
        for step, stats in recorder.stats.items():
            stats.save(f"{folder}/{rank}_{step}.json")
    finally:
        dist.destroy_process_group()
