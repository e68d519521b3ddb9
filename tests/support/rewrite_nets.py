"""Networks whose own forward must be rewritten, and the judges that compare them with the oracle.

The oracle is the original with its dropped calls skipped.
"""

import copy
import itertools
import sys
import types
import warnings
from typing import TypeVar

import torch
from oracle import assert_same, dropped
from torch import nn

import nmconv

T = TypeVar("T")


def net(forward, *bases, methods=None, **parts):
    """A module of a class of its own; parts are children and attributes."""
    space = {"forward": forward, "__module__": __name__, **(methods or {})}
    model = types.new_class("Net", bases or (nn.Module,), {}, lambda names: names.update(space))()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def conv(inputs=4, outputs=4):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def convs(*names):
    return {name: conv() for name in names}


def picture(*shape, seed=0):
    return torch.randn(*(shape or (2, 4, 6, 6)), generator=torch.Generator().manual_seed(seed))


def run(model, args, kwargs, training):
    """Output, arguments and buffers after one seeded call."""
    args, kwargs = copy.deepcopy((args, kwargs))
    kept = {name: value.clone() for name, value in model.named_buffers()}
    model.train(training)
    torch.manual_seed(1)
    with torch.no_grad():
        output = model(*args, **kwargs)
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        for name, value in model.named_buffers():
            value.copy_(kept[name])
    return output, args, kwargs, buffers


def apply(model, plan, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        return nmconv.apply_plan(model, plan, **options)


def faithful(model, plan, *args, **kwargs):
    """Convert, hold against the oracle in both modes, and hand back the converted model, in eval mode."""
    gone = [site for site in plan.sites if site.action == "drop"]
    names = {module: name for name, module in model.named_modules()}
    expected = []
    for training in (False, True):
        with dropped(model, gone) as log:
            expected.append(run(model, args, kwargs, training))
        log.assert_all_hit(training=training)
    log.assert_inplace_agrees()
    keys = list(model.state_dict())
    converted = apply(model, plan, example_inputs=None if kwargs else args)
    assert isinstance(converted, type(model))
    assert list(converted.state_dict()) == keys
    assert set(model.modules()) == set(names), "the original has other modules now"
    for training, wanted in zip((False, True), expected, strict=True):
        assert_same(run(converted, args, kwargs, training), wanted, f"training={training}")
    model.eval()
    return converted.eval()


def planned(model, *args, ratio="2:1", **kwargs):
    return nmconv.make_plan(model, ratio, example_inputs=kwargs or args or picture(), keep="boundary")


def droppable(plan):
    return [site for site in plan.sites if site.action != "skip" and not site.locked]


def every_subset(model, *args, count, **kwargs):
    """The net has so many sites that can be dropped, and every choice of them is done right."""
    plan = planned(model, *args, **kwargs)
    sites = droppable(plan)
    assert len(sites) == count, str(plan)
    args = args or (() if kwargs else (picture(),))
    for gone in itertools.product((False, True), repeat=count):
        edits = {site.id: "drop" if drop else "keep" for site, drop in zip(sites, gone, strict=True)}
        converted = faithful(model, plan.edit(edits), *args, **kwargs)
    return plan.edit(dict.fromkeys((site.id for site in sites), "drop")), converted


def everything(model, *args, **kwargs):
    """Drop whatever can be dropped: it is done right, or there is a reason in words, and the model is as it was.

    Returns:
        The converted model (at least what 2:1 drops and can be dropped is gone), and its plan.
    """
    args = args or (() if kwargs else (picture(),))
    plan = planned(model, *args, **kwargs)
    converted = faithful(model, plan, *args, **kwargs)  # what is planned can be done
    edited = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    try:
        apply(model, edited)
    except nmconv.RewriteError as error:
        assert any(reason in str(error) for reason in ("cannot be rewritten: ", "one decision would change several"))
        return converted, plan
    return faithful(model, edited, *args, **kwargs), edited


def outer(block, **more):
    """conv, the block with an activation in its own forward, conv, a ReLU module: at 2:1 the block's is to go."""

    def forward(self, x):
        return self.relu(self.conv2(self.block(self.conv1(x))))

    return net(forward, **convs("conv1", "conv2"), block=block, relu=nn.ReLU(), **more)


LIBRARY = types.ModuleType("nmconv_test_library")
exec(
    """
import torch
def as_list(x):
    return [x] if isinstance(x, torch.Tensor) else list(x)
def first(x):
    return x[0] if isinstance(x, (tuple, list)) else x
def exact(x):
    return x if type(x) is torch.Tensor else x[0]
""",
    LIBRARY.__dict__,
)
sys.modules["nmconv_test_library"] = LIBRARY
exec(
    """
import torch

def twice_if_tensor(x):
    return x * 2 if isinstance(x, torch.Tensor) else x

def scaled(x, module):
    return x * module.scale

def precise(x, module):
    with torch.autocast("cpu", enabled=False):
        return module(x.float())

def inner(x, module):
    return precise(x, module)

def deep(x, module):
    return inner(x, module)

@torch.autocast("cpu", enabled=False)
def decorated(x, module):
    return module(x.float())

def with_grad(x, module):
    with torch.enable_grad():
        return module(x)
""",
    LIBRARY.__dict__,
)
