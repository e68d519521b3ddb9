"""A converted model's hooks and parametrizations."""

import warnings

import pytest
import torch
from converted_nets import Block, build, close, gradients, picture, slow, wanted
from oracle import assert_same, dropped
from torch import nn

import nmconv

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "net", "prelu"])
def test_hooks_run_as_before_and_not_during_conversion(name):
    model = build(name)
    seen = []

    def hook(module, args, output):
        seen.append(type(module).__name__)

    def before(module, args):
        seen.append("before")

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, Block)) or type(module).__name__ == "BasicBlock":
            module.register_forward_hook(hook)
            module.register_forward_pre_hook(before)
    converted = nmconv.convert(model)
    gone = nmconv.get_plan(converted).changes
    assert seen == []
    x = picture(32)
    with torch.no_grad():
        expected = wanted(model, gone, model, x)
        wanted_calls, seen[:] = list(seen), []
        assert_same(converted(x), expected)
    assert seen == wanted_calls


def test_hooks_that_change_values_and_gradients():
    model = build("net")
    model.blocks[0].conv1.register_forward_hook(lambda module, args, output: output * 2)
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.blocks[1].conv2.register_full_backward_hook(lambda module, grads, outer: (grads[0] * 3,))
    model.blocks[0].register_forward_hook(
        lambda module, args, kwargs, output: output - 1, with_kwargs=True, always_call=True
    )
    converted = nmconv.convert(model)
    gone = nmconv.get_plan(converted).changes
    x = picture(16)
    with dropped(model, gone):
        expected = gradients(model, x)
    close(gradients(converted, x), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_on_activations(inplace):
    """Those on kept ones run; those on a dropped one see the value pass, and can be removed."""
    model = build("timm/resnet18")
    seen = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, output.min() < 0)))
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    plan = nmconv.make_plan(model)
    assert seen == []
    converted = nmconv.apply_plan(model, plan, inplace=inplace)
    assert seen == []
    with torch.no_grad():
        converted(picture())
    kept = [site.name for site in plan.sites if site.action == "keep"]
    gone = [site.name for site in plan.changes]
    names = [name for name, _ in seen]
    assert [name for name in names if name in kept] == kept
    assert [name for name in names if name in gone] == gone
    assert all(bool(negative) == (name in gone) for name, negative in seen)
    if inplace:
        for handle in handles:
            handle.remove()
        seen.clear()
        converted(picture())
        assert seen == []


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(module)


NORMED = {
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("how", NORMED)
@pytest.mark.parametrize("name", [slow("timm/resnet18"), slow("torchvision/resnet18"), "net"])
def test_normed_weights(name, how):
    model = build(name)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            NORMED[how](module)
    model.train()
    with torch.no_grad():
        model(picture(32))  # the old ones leave a tensor that is no leaf
    model(picture(32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = nmconv.make_plan(build(name))
    plan = nmconv.make_plan(model)
    assert [(site.id, site.action) for site in plan.sites] == [(site.id, site.action) for site in plain.sites]
    converted = nmconv.apply_plan(model, plan)
    assert_same(dict(model.state_dict()), before, "the original")
    assert_same(dict(converted.state_dict()), before)
    x = picture(32)
    for training in (False, True):
        with dropped(model, plan.changes):
            expected = gradients(model, x, training)
        found = gradients(converted, x, training)
        close(found, expected)
        assert_same(dict(converted.named_buffers()), dict(model.named_buffers()))
