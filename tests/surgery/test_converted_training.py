"""A converted model compiles, runs in other types and layouts, and trains."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from converted_nets import LIGHT, RUN, both, build, close, gradients, picture, seeded, slow, wanted
from oracle import assert_same, dropped
from torch import nn
from zoo import models as zoo

import nmconv

torch.set_num_threads(1)


COMPILED = ("timm/resnet18", "torchvision/resnet18", "net", slow("timm/mobilenetv2_100"), slow("timm/dla46x_c"))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- compilers -----------------------------------------------------------------------------------------------------


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


# --- types, layouts, devices ---------------------------------------------------------------------------------------


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


# --- training ------------------------------------------------------------------------------------------------------


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
