"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the trained model, besides its initial weights, its teacher and the pictures."""

    epochs: int = 10
    batch_size: int = 128  # pictures per update, over all processes
    accumulate: int = 1  # forward passes per update in each process
    opt: str = "sgd"  # any of timm's optimizers; "sgd" uses Nesterov momentum
    lr: float = 0.1
    weight_decay: float = 5e-4
    schedule: str = "cosine"  # any of timm's schedulers
    warmup: float = 0.5  # epochs, included in the above
    seed: int = 0  # seeds the order of the pictures and their augmentation
    augment: str = "shift"  # "shift" and mirror decoded pictures; "timm": timm's transforms; "none"
    auto_augment: str = ""  # in timm's notation, such as "rand-m9-mstd0.5"
    erase: float = 0.0  # probability of timm's random erasing
    mixup: float = 0.0  # alpha of timm's mixup; with CutMix, too, each gets half of the batches
    cutmix: float = 0.0  # alpha of timm's CutMix
    smoothing: float = 0.0  # label smoothing
    ema: float = 0.0  # decay of timm's exponential moving average of the weights; 0 for none
    distill: float = 0.0  # weight of the distillation loss; the labels' loss has the rest
    temperature: float = 4.0
    precision: str = "no"  # in accelerate's notation: "no", "bf16", "fp16"

    def check(self, pictures: int, processes: int, teacher: bool, device: torch.device) -> None:
        """Raise ValueError if a field is invalid for this run."""
        if self.epochs < 1 or self.accumulate < 1:
            raise ValueError(f"epochs={self.epochs}, accumulate={self.accumulate}: give 1 or more")
        if teacher != (self.distill > 0):
            raise ValueError(f"distill={self.distill}: distillation needs a teacher and a weight above 0, or neither")
        if pictures < self.batch_size:
            raise ValueError(f"{pictures} pictures do not fill a batch of {self.batch_size}: give a smaller batch_size")
        parts = processes * self.accumulate
        if self.batch_size % parts:
            raise ValueError(f"batch_size={self.batch_size} is not divisible by {parts} forward passes an update")
        if self.batch_size // parts % 2 and (self.mixup or self.cutmix):
            raise ValueError(f"timm mixes pairs of pictures: give an even batch size, not {self.batch_size // parts}")
        if self.augment not in ("shift", "timm", "none"):
            raise ValueError(f"augment={self.augment!r}: give 'shift', 'timm' or 'none'")
        if self.augment != "timm" and (self.auto_augment or self.erase):
            raise ValueError(f"auto_augment and erase need augment='timm', not {self.augment!r}")
        if self.precision == "bf16" and device.type == "cpu" and not fast_bf16():
            raise ValueError(
                "precision='bf16': this CPU has no instructions for it, which makes it many times slower: give 'no'"
            )


def fast_bf16() -> bool:
    """Return whether this CPU has bfloat16 instructions."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
