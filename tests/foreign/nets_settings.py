"""What a model is made with: settings of all types, norms of all kinds, what tools do to layers, forwards put on it."""

from __future__ import annotations

import dataclasses
import enum
import threading
import types
import warnings
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from .networks import Two, conv, image, network, unit

Tuple = namedtuple("Tuple", "scale stages")


@network(counts=(4, 2))
class NamedTuple(nn.Module):
    """Fault H: a rewritten block that reads a namedtuple, as EfficientNet-PyTorch does."""

    def __init__(self):
        super().__init__()
        self.cfg, self.act = Tuple(0.5, (1, 2)), nn.SiLU()
        self.c1, self.c2, self.c3, self.c4 = conv(3), conv(), conv(), conv()

    def forward(self, x):
        y = self.act(self.c2(self.act(self.c1(x)))) * self.cfg.scale
        return self.act(self.c4(self.act(self.c3(y)))) * self.cfg.stages[1]


@dataclasses.dataclass(frozen=True)
class Settings:
    scale: float = 0.5
    act: str = "relu"
    residual: bool = False


@network(counts=(2, 1))
class DataClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.settings, self.act = Settings(), nn.ReLU()
        self.c1, self.c2 = conv(3), conv()

    def forward(self, x):
        y = getattr(F, self.settings.act)(self.c2(F.relu(self.c1(x))))
        return y + x if self.settings.residual else y * self.settings.scale


class Order(enum.Enum):
    POST, PRE = "post", "pre"


@network(options=({"order": Order.PRE}, {"order": Order.POST}))
class EnumArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.n = nn.Sequential(unit(3), unit()), conv(), conv(4, 4, 1), nn.BatchNorm2d(4)
        self.order = Order.PRE

    def forward(self, x, order=None):
        y = self.a(self.first(x))
        if (order or self.order) is Order.POST:
            return self.n(self.b(y))
        return self.b(self.n(y))


@network(options=({"order": "add"}, {"order": "none"}))
class MatchedText(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Sequential(unit(3), unit()), conv(), conv(4, 4, 1)

    def forward(self, x, order="none"):
        y = self.a(self.first(x))
        match order:
            case "none":
                pass
            case "add":
                y = y + 1
        return self.b(y)


@network(counts=(4, 2))
class PlainSettings(nn.Module):
    """A namespace, a dict and a list of settings."""

    def __init__(self):
        super().__init__()
        self.args, self.table, self.widths = types.SimpleNamespace(slope=0.1, k=2), {"drop": 0.3}, [4, 4]
        self.c = nn.ModuleList([conv(3), conv(), conv(), conv()])

    def forward(self, x):
        for c in self.c:
            x = F.dropout(F.leaky_relu(c(x), self.args.slope), self.table["drop"], self.training)
        return x * len(self.widths) * self.args.k


@network(counts=(4, 2), merges=True, settings=({"drop_rate": 0.2}, {"drop_rate": 0.0}))
class DropRate(nn.Module):
    """Fault T's shape."""

    def __init__(self):
        super().__init__()
        self.drop_rate, self.body, self.act = 0.5, nn.Sequential(unit(3), unit()), nn.ReLU()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        x = self.act(self.b(self.act(self.a(self.body(x)))))
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate > 0 else x


@network(counts=(4, 2), merges=True)
def sync_norms():
    return nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(unit(3), unit(), unit(), unit()))


@network(converts=False)
def lazy_norms():
    """Fault N."""
    return nn.Sequential(conv(3), nn.LazyBatchNorm2d(), nn.ReLU(), conv(), nn.LazyBatchNorm2d(), nn.ReLU())


@network(converts=False)
def lazy_convolutions():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyConv2d(4, 3), nn.ReLU())


@network(counts=(2, 1), merges=True)
def lazy_convolutions_that_ran():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(4, 1), nn.ReLU())
    model(torch.zeros(2, 3, 8, 8))
    return model


@network(converts=False, copies=False)
def pruned():
    model = nn.Sequential(unit(3), unit(), unit(), unit(4, 4, 1))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            prune.l1_unstructured(layer, "weight", 0.3)
    return model


@network(counts=(4, 2), merges=True)
def pruned_for_good():
    model = pruned()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            prune.remove(layer, "weight")
    return model


@network(converts=False, double=False)
def prepared_for_quantisation():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
            self.body = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU())

        def forward(self, x):
            return self.dequant(self.body(self.quant(x)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Quantised().train()
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        model = torch.ao.quantization.prepare_qat(model)
        model(torch.randn(2, 3, 8, 8))
    return model


@network(counts=(2, 1), merges=True, copies=False)
class Locked(nn.Module):
    """Fault N: what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock, self.body = threading.Lock(), nn.Sequential(unit(3), unit())

    def forward(self, x):
        with self.lock:
            return self.body(x)


class Faster(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = conv(3), nn.BatchNorm2d(4), conv(4, 4, 1)
        self.tail = nn.Sequential(nn.ReLU(), unit(), unit(), unit())

    def fast(self, x):
        return self.tail(self.b(self.a(x)))

    def forward(self, x):
        return self.tail(self.b(self.n(self.a(x))))


@network(converts=False)
def forward_put_on_the_model():
    """Fault D: what runs is not the class's forward."""
    model = Faster()
    model.forward = model.fast
    return model


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(unit(3), unit(), unit(), unit())

    def run(self, x):
        return self.body(x)


@network(converts=False)
def forward_of_the_object_alone():
    """Fault D: the class has none."""
    model = NoForward()
    model.forward = model.run
    return model


@network(converts=False)
def forward_of_a_child_replaced():
    model = nn.Sequential(Faster(), unit())
    child = model[0]
    child.forward = types.MethodType(lambda self, x: self.tail(self.b(self.a(x) * 2)), child)
    return model


@network(counts=(4, 2), merges=True)
def sequential_in_a_sequential():
    return nn.Sequential(nn.Sequential(unit(3), nn.Identity(), unit()), nn.Sequential(nn.Sequential(unit(), unit())))


@network(counts=(4, 2))
def parametric():
    """One PReLU for several convolutions."""
    act = nn.PReLU(4)
    return nn.Sequential(*(layer for at in range(4) for layer in (conv(4 if at else 3), act)))


@network(converts=False)
class ReadsTheSlope(Two):
    """Another reads the parameter of an activation that may be dropped."""

    def prepare(self):
        self.r = nn.PReLU(4)

    def forward(self, x):
        return self.q(self.b(self.r(self.a(x)))) * self.r.weight.view(1, -1, 1, 1)


@network(image(), counts=(3, 2))
class Tied(nn.Module):
    """One convolution, called three times."""

    def __init__(self):
        super().__init__()
        self.stem, self.c, self.d, self.r = unit(3), conv(), conv(), nn.ReLU()
        self.d.weight = self.c.weight

    def forward(self, x):
        return self.r(self.d(self.r(self.c(self.stem(x)))))
