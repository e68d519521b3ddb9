"""Detectors: shared activations, implicit knowledge, weighted pyramids, heads that run once a level, frozen norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from .networks import conv, image, network, unit


class Block(nn.Module):
    """YOLO's convolution: all that are made share one activation."""

    default_act = nn.SiLU()

    def __init__(self, inputs, outputs, kernel=1, stride=1, act=True):
        super().__init__()
        self.conv = conv(inputs, outputs, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = self.default_act if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Neck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.cv1, self.cv2 = Block(channels, channels, 3), Block(channels, channels, 3)
        self.add = True

    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


@network(counts=(6, 4), merges=True)
class YoloC2f(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.cv1, self.cv2 = Block(3, 8, 3, 2), Block(8, 8), Block(16, 8)
        self.m = nn.ModuleList(Neck(4) for _ in range(1))
        self.m.append(Block(4, 4, 3))
        self.detect = conv(8, 5, 1)

    def forward(self, x):
        y = list(self.cv1(self.stem(x)).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.detect(self.cv2(torch.cat(y, 1)))


class Unregistered(nn.Module):
    """Has its activation from its class alone: no module of the model's."""

    act = nn.SiLU()

    def __init__(self, inputs):
        super().__init__()
        self.conv, self.bn = conv(inputs), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@network(converts=False)
def yolo_activation_of_the_class():
    return nn.Sequential(Unregistered(3), Unregistered(4), Unregistered(4), Unregistered(4))


class Implicit(nn.Module):
    def __init__(self, channels, multiply):
        super().__init__()
        self.implicit, self.multiply = nn.Parameter(torch.randn(1, channels, 1, 1)), multiply

    def forward(self, x):
        return self.implicit * x if self.multiply else self.implicit + x


class RepConv(nn.Module):
    def __init__(self, channels, deploy=False):
        super().__init__()
        self.deploy, self.act = deploy, nn.SiLU()
        self.rbr_identity = nn.BatchNorm2d(channels)
        self.rbr_dense = nn.Sequential(conv(channels, channels, bias=False), nn.BatchNorm2d(channels))
        self.rbr_1x1 = nn.Sequential(conv(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        if hasattr(self, "rbr_reparam"):
            return self.act(self.rbr_reparam(x))
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.act(self.rbr_dense(x) + self.rbr_1x1(x) + identity)


@network(counts=(3, 2), merges=True, merges_plain=True)
class Yolov7Implicit(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = Block(3, 4, 3, 2), RepConv(4), RepConv(4)
        self.ia, self.m, self.im = Implicit(4, False), conv(4, 6, 1), Implicit(6, True)

    def forward(self, x):
        return self.im(self.m(self.ia(self.two(self.one(self.stem(x))))))


class Fuse(nn.Module):
    """BiFPN's fast normalised fusion, its activation on a parameter."""

    def __init__(self, inputs):
        super().__init__()
        self.w, self.relu, self.swish = nn.Parameter(torch.randn(inputs)), nn.ReLU(), nn.SiLU()
        self.conv = nn.Sequential(conv(4, 4, groups=4, bias=False), conv(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, *maps):
        w = self.relu(self.w)
        w = w / (w.sum() + 1e-4)
        return self.conv(self.swish(sum(w[at] * each for at, each in enumerate(maps))))


@network(merges_plain=True)
class BiFpn(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Sequential(unit(3, 4), unit()), unit(stride=2)
        self.up, self.out3, self.out4 = Fuse(2), Fuse(2), Fuse(3)

    def forward(self, x):
        p3 = self.stem(x)
        p4 = self.down(p3)
        mid = self.up(p3, F.interpolate(p4, size=p3.shape[-2:]))
        return self.out3(p3, mid), self.out4(p4, p4, F.adaptive_max_pool2d(mid, p4.shape[-2:]))


@network()
class ActivatedWeight(nn.Module):
    """Fault I at its shortest: an activation on a parameter, beside a chain as plain as can be."""

    def __init__(self):
        super().__init__()
        self.w, self.relu, self.c1, self.rest = (
            nn.Parameter(torch.ones(2)),
            nn.ReLU(),
            conv(3),
            nn.Sequential(unit(), unit()),
        )

    def forward(self, x):
        return self.rest(self.c1(x) * self.relu(self.w)[0])


@network(counts=(6, 4), merges=True)
class RetinaHead(nn.Module):
    """One head for all levels: 2 of 4 stay in the body's two chains and 1 of 2 ... in the tower."""

    def __init__(self):
        super().__init__()
        self.body, self.next = nn.Sequential(unit(3), unit()), nn.Sequential(unit(stride=2), unit())
        self.tower = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU())
        self.score, self.box = conv(4, 3), conv(4, 8)

    def forward(self, x):
        x = self.body(x)
        heads = [self.tower(level) for level in (x, self.next(x))]
        return {"score": [self.score(h) for h in heads], "box": [self.box(h).flatten(2) for h in heads]}


@network(counts=(6, 3), merges=True)
class Fpn(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.ModuleList([nn.Sequential(unit(3), unit()), nn.Sequential(unit(stride=2), unit())])
        self.top = nn.Sequential(unit(stride=2), unit())
        self.lateral = nn.ModuleList(conv(4, 4, 1) for _ in range(3))

    def forward(self, x):
        maps = []
        for stage in [*self.c, self.top]:
            x = stage(x)
            maps.append(x)
        out = [self.lateral[2](maps[2])]
        for at in (1, 0):
            out.insert(0, self.lateral[at](maps[at]) + F.interpolate(out[0], size=maps[at].shape[-2:], mode="nearest"))
        return tuple(out)


class FrozenBottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = conv(4, 4, 1), conv(), conv(4, 4, 1)
        self.n1, self.n2, self.n3 = FrozenBatchNorm2d(4), FrozenBatchNorm2d(4), FrozenBatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.n1(self.c1(x)))
        y = self.n3(self.c3(self.relu(self.n2(self.c2(y)))))
        y += x
        return self.relu(y)


@network(counts=(7, 5), merges=True)
def frozen_norms():
    stem = nn.Sequential(conv(3), FrozenBatchNorm2d(4), nn.ReLU(inplace=True))
    return nn.Sequential(stem, FrozenBottleneck(), FrozenBottleneck())


class OwnFrozenNorm(nn.Module):
    """Detectron's, as buffers and arithmetic."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


@network(counts=(4, 2))
def own_frozen_norms():
    def block(inputs):
        return nn.Sequential(conv(inputs), OwnFrozenNorm(4), nn.ReLU())

    return nn.Sequential(block(3), block(4), block(4), block(4))


@network(converts=True, given=True)
class SpaceToDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = unit(12, 4), unit(), unit(16, 4)

    def forward(self, x):
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        y = [self.c2(self.c1(torch.cat(parts, 1)))]
        y.extend(F.max_pool2d(y[-1], 5, 1, 2) for _ in range(3))
        return self.c3(torch.cat(y, 1))


@network(options=({"targets": torch.ones(2)},))
class LossInTraining(nn.Module):
    """Returns predictions in eval mode, losses in train mode."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(unit(3), unit()), conv(4, 2, 1)

    def forward(self, x, targets=None):
        y = self.head(self.body(x))
        if not self.training:
            return y if targets is None else (y, targets)
        targets = torch.zeros(len(x)) if targets is None else targets
        return {"loss": (y.mean((1, 2, 3)) - targets).abs().sum(), "norm": y.square().mean()}


def pictures(batch, size):
    return ([torch.rand(3, size, size + 3 * at) for at in range(batch)],)


@network(pictures, given=True, converts=False, trains=False, sizes=(32, 27), slow=True)
def faster_rcnn():
    backbone = nn.Sequential(unit(3, 4), unit(stride=2), unit(), unit(stride=2))
    backbone.out_channels = 4
    return FasterRCNN(
        backbone,
        min_size=24,
        max_size=40,
        rpn_anchor_generator=AnchorGenerator(((8, 16),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU()),
        box_predictor=_Predictor(),
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_test=10,
        box_detections_per_img=5,
    )


class _Predictor(nn.Module):
    def __init__(self):
        super().__init__()
        self.score, self.box = nn.Linear(8, 3), nn.Linear(8, 12)

    def forward(self, x):
        return self.score(x), self.box(x)


@network(image(4), given=True, counts=(2, 1))
class FourChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(unit(), unit())

    def forward(self, x):
        return self.body(x).mean((2, 3))
