"""A converted model has its class, attributes and methods as before."""

import pytest
import timm
import torch
from converted_nets import RUN, SURFACE, both, build, fitting, gradients, picture, seeded, slow, wanted
from oracle import assert_same, dropped
from torch import nn

import nmconv

torch.set_num_threads(1)


@pytest.mark.parametrize("name", SURFACE)
def test_class_attributes_and_names_are_the_same(name):
    model = build(name, "meta")
    everything = surface(model)
    converted = nmconv.convert(model)
    assert surface(model) == everything
    swapped = {path for path, module in converted.named_modules() if type(module) is nn.Identity}
    assert_same(surface(converted, swapped), surface(model, swapped))
    for (path, one), (other_path, other) in zip(model.named_modules(), converted.named_modules(), strict=True):
        assert path == other_path
        if isinstance(other, nn.Identity) and not isinstance(one, nn.Identity):
            continue  # a dropped activation
        assert isinstance(other, type(one))
        assert type(other).__name__ == type(one).__name__
        assert type(other).__qualname__ == type(one).__qualname__
        assert type(other).__module__ == type(one).__module__
        assert type(other).__doc__ == type(one).__doc__
        assert set(dir(one)) <= set(dir(other))
        fresh = {key for key in vars(other) if key not in vars(one)}
        assert fresh == ({"_nmconv_plan"} if not path else set()), path
        assert one._get_name() == other._get_name()
        assert one.extra_repr() == other.extra_repr()
        assert other.forward.__doc__ == one.forward.__doc__


def surface(model, besides=()):
    """All public attributes whose values are plain data, modules of some names left out."""
    found = {}
    for path, module in model.named_modules():
        if path in besides:
            continue
        for key, value in vars(module).items():
            if not key.startswith("_") and isinstance(value, (bool, int, float, str, tuple, type(None))):
                found[f"{path}.{key}"] = value
    for key in ("feature_info", "pretrained_cfg", "default_cfg", "num_features", "num_classes", "head_hidden_size"):
        value = getattr(model, key, None)
        found[f"property {key}"] = repr(getattr(value, "info", value))
    return found


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "net"])
def test_repr_differs_in_the_dropped_activations_only(name):
    model, _, converted = both(name)
    one, other = repr(model).splitlines(), repr(converted).splitlines()
    assert len(one) == len(other)
    for before, after in zip(one, other, strict=True):
        assert before == after or after.endswith(": Identity()"), after


@pytest.mark.parametrize("name", [n for n in RUN if "timm/" in str(n)])
def test_timm_methods(name):
    model = build(name)
    x = fitting(name)
    converted = nmconv.convert(model)
    gone = nmconv.get_plan(converted).changes
    with torch.no_grad():
        output = converted(x)
        assert_same(output, wanted(model, gone, model, x))
        features = converted.forward_features(x)
        assert_same(converted.forward_head(features), output)
        if not any(site.owner == "" for site in gone):
            assert_same(features, wanted(model, gone, model.forward_features, x))
        head = converted.forward_head(features, pre_logits=True)
        assert_same(head, model.forward_head(features, pre_logits=True))
        assert type(converted.get_classifier()) is type(model.get_classifier())
        if hasattr(model, "forward_intermediates") and not any(site.owner == "" for site in gone):
            found = converted.forward_intermediates(x)
            assert_same(found, wanted(model, gone, model.forward_intermediates, x))
        for each in (model, converted):
            torch.manual_seed(3)
            each.reset_classifier(7)
        assert converted.num_classes == 7
        assert_same(converted(x), wanted(model, gone, model, x))
        for each in (model, converted):
            each.reset_classifier(0)
        assert_same(converted(x), wanted(model, gone, model, x))
    assert repr(converted.group_matcher()) == repr(model.group_matcher())
    assert repr(converted.group_matcher(coarse=True)) == repr(model.group_matcher(coarse=True))
    groups = [
        timm.models.group_parameters(each, each.group_matcher(coarse=False), reverse=True)
        for each in (model, converted)
    ]
    assert groups[0] == groups[1]
    if hasattr(model, "no_weight_decay"):
        assert converted.no_weight_decay() == model.no_weight_decay()


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/dla46x_c"])
def test_the_classifier_may_be_reset_before_conversion(name):
    model = build(name)
    model.reset_classifier(3)
    converted = nmconv.convert(model)
    with torch.no_grad():
        assert_same(converted(picture()), wanted(model, nmconv.get_plan(converted).changes, model, picture()))


def test_a_plan_serves_a_model_with_another_classifier():
    plan = nmconv.make_plan(build("timm/resnet18"))
    model = timm.create_model("resnet18", num_classes=3).eval()
    converted = nmconv.apply_plan(model, plan)
    with torch.no_grad():
        assert_same(converted(picture()), wanted(model, plan.changes, model, picture()))


CHECKPOINTED = (
    "timm/resnet18",
    "timm/mobilenetv2_100",
    "timm/regnety_002",
    slow("timm/levit_128s"),
    slow("timm/resnetv2_50"),
    "timm/repvgg_a0",
)


@pytest.mark.parametrize("first", [True, False], ids=["before conversion", "after conversion"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing(name, first):
    model, x = build(name), fitting(name)
    plain = nmconv.convert(model)
    gone = nmconv.get_plan(plain).changes
    expected = gradients(plain, x)
    if first:
        model.set_grad_checkpointing()
    converted = nmconv.convert(model)
    assert [site.id for site in nmconv.get_plan(converted).changes] == [site.id for site in gone]
    if not first:
        converted.set_grad_checkpointing()
    calls = []
    for module in converted.modules():
        if not module._modules:
            module.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(converted, x)
    again = len(calls)
    assert_same(found, expected)
    converted.set_grad_checkpointing(False)
    calls.clear()
    assert_same(gradients(converted, x), gradients(plain, x))
    assert again > len(calls), "nothing was computed again"


def test_checkpointing_a_converted_block_by_hand():
    _model, _, converted = both("net")
    x = picture(16).requires_grad_()
    y = converted.train().stem(x)
    torch.manual_seed(1)
    converted.blocks[0](y).sum().backward()
    expected = x.grad.clone()
    for reentrant in (False, True):
        x.grad = None
        torch.manual_seed(1)
        y = converted.stem(x)
        torch.manual_seed(1)
        torch.utils.checkpoint.checkpoint(converted.blocks[0], y, use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close(x.grad, expected)


def test_reparameterizing_after_conversion():
    from timm.utils.model import reparameterize_model

    _, _, converted = both("timm/repvgg_a0")
    fused = reparameterize_model(converted)
    with torch.no_grad():
        torch.testing.assert_close(fused(picture()), converted(picture()), rtol=1e-3, atol=1e-3)


def test_features_only():
    model = timm.create_model("resnet18", features_only=True, out_indices=(1, 3)).eval()
    converted = nmconv.convert(model)
    gone = nmconv.get_plan(converted).changes
    assert len(gone) == 6
    assert converted.feature_info.channels() == model.feature_info.channels()
    assert converted.feature_info.reduction() == model.feature_info.reduction()
    with torch.no_grad():
        assert_same(converted(picture()), wanted(model, gone, model, picture()))


def test_torchvision_attributes_and_aux_outputs():
    model, gone, converted = both("torchvision/googlenet")
    x = picture(96)
    for training in (False, True):
        with torch.no_grad(), dropped(model, gone):
            expected = seeded(model, x, training)
        with torch.no_grad():
            found = seeded(converted, x, training)
        assert type(found) is type(expected)
        assert_same(found, expected)
    assert converted.aux_logits is True and converted.transform_input is False
    for each in (model, converted):
        each.aux_logits = False
        each.aux1 = each.aux2 = None
    with torch.no_grad():
        assert_same(seeded(converted, x, True), wanted(model, gone, seeded, model, x, True))


def test_feature_extraction_from_a_converted_model():
    from torchvision.models.feature_extraction import create_feature_extractor

    model, gone, converted = both("torchvision/resnet18")
    found = create_feature_extractor(converted, {"layer1": "one", "layer3": "three"})(picture())
    with dropped(model, gone):
        y = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(picture())))))
        expected = {"one": y, "three": model.layer3(model.layer2(y))}
    assert_same(dict(found), expected)


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "timm/mobilenetv2_100"])
def test_fx_traces_what_it_traced_before(name):
    _model, _, converted = both(name)
    traced = torch.fx.symbolic_trace(converted)
    with torch.no_grad():
        assert_same(traced(picture()), converted(picture()))
