"""A merged model is itself: class, methods, copies, files, compilers, dtypes and layouts."""

import copy
import io
import warnings

import pytest
import timm
import torch
import torchvision
from copies import pickled, saved
from merge_nets import assert_agree, assert_near, convs_of, merge, picture, settle, statistics
from test_merge_usage import SHAPES, Block, Net, original
from torch import nn

import nmconv
from nmconv import timing
from nmconv.merging import latency_gate

torch.set_num_threads(1)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def model():
    return original()


@pytest.fixture
def merged(model):
    return merge(model)


def converted_mobilenet():
    torch.manual_seed(0)
    model = statistics(timm.create_model("mobilenetv2_050", num_classes=7))
    return nmconv.convert(model, "3:1", relocate=True, keep="boundary")


# What it is ----------------------------------------------------------------------------------------------------------


def test_class_methods_and_attributes(model, merged):
    assert type(merged) is Net and isinstance(merged.blocks[0], Block)
    assert type(merged.blocks[0]).__name__ == "Block"
    assert dir(type(model)) == dir(type(merged))
    assert [name for name, _ in merged.named_children()] == [name for name, _ in model.named_children()]
    x = picture(3, 24, 24)
    with torch.no_grad():
        assert_near(merged.forward_features(x), model.forward_features(x))
        assert_near(merged.blocks[0](merged.stem(x)), model.blocks[0](model.stem(x)))
        assert_near(merged.blocks[1].forward(x[:, :1].expand(-1, 4, -1, -1)), model.blocks[1](x[:, [0, 0, 0, 0]]))


def test_what_timm_offers():
    converted = converted_mobilenet()
    merged = merge(converted)
    assert type(merged) is type(converted)
    x = picture(3, 64, 64, batch=2)
    with torch.no_grad():
        assert_near(merged.forward_features(x), converted.forward_features(x), 1e-9)
        for one, other in zip(merged.forward_intermediates(x)[1], converted.forward_intermediates(x)[1], strict=True):
            assert_near(one, other, 1e-9)
    assert merged.feature_info == converted.feature_info
    assert merged.get_classifier().out_features == 7
    merged.reset_classifier(3)
    assert merged.double()(x).shape == (2, 3)
    assert nmconv.get_plan(merged) == nmconv.get_plan(converted)
    merged.set_grad_checkpointing(True)
    assert sum(value.numel() for value in merged.parameters()) < sum(value.numel() for value in converted.parameters())


def test_what_torchvision_offers():
    torch.manual_seed(0)
    model = statistics(torchvision.models.mobilenet_v2(width_mult=0.5))
    converted = nmconv.convert(model, "3:1", relocate=True, keep="boundary")
    merged = merge(converted)
    assert convs_of(merged, 3, 64, 64) < 30
    assert assert_agree(merged, converted, (3, 64, 64), (3, 33, 70), tolerance=1e-8, batch=2) == 2
    with torch.no_grad():
        x = picture(3, 64, 64, batch=2)
        assert_near(merged.features(x), converted.features(x), 1e-8)


# Copies and files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved, copy.copy])
@pytest.mark.parametrize("live", [True, False])
def test_copies(model, duplicate, live):
    merged = merge(model, live=live)
    again = duplicate(merged)
    assert type(again) is Net and isinstance(again.blocks[0], Block)
    assert assert_agree(again, model, *SHAPES)
    assert nmconv.get_merges(again) == nmconv.get_merges(merged)
    if duplicate is not copy.copy:
        with torch.no_grad():
            for value in again.parameters():
                value.zero_()
        assert assert_agree(merged, model, *SHAPES)
    assert list(again.state_dict()) == list(merged.state_dict())


def test_state_dicts(model):
    """What one merged model holds, another loads."""
    other = original()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.3)
    one, two = merge(model), merge(other)
    assert list(one.state_dict()) == list(two.state_dict())
    assert one.load_state_dict(two.state_dict(), strict=True)
    assert assert_agree(one, other, *SHAPES)
    file = io.BytesIO()
    torch.save(two.state_dict(), file)
    file.seek(0)
    third = merge(original())
    third.load_state_dict(torch.load(file, weights_only=True))
    assert assert_agree(third, other, *SHAPES)


def test_a_state_dict_loaded_after_it_ran(merged, model):
    """Nothing that was computed for one set of weights outlives it."""
    other = original()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(-0.7)
        merged(picture(3, 24, 24)), merged(picture(3, 31, 23))
    merged.load_state_dict(merge(other).state_dict())
    assert assert_agree(merged, other, *SHAPES, (3, 24, 24), (3, 31, 23))


def test_parameters_assigned_and_moved(merged, model):
    merged(picture(3, 24, 24))
    merged.load_state_dict({key: value.clone() for key, value in merged.state_dict().items()}, assign=True)
    assert assert_agree(merged, model, *SHAPES)
    merged.float()
    with torch.no_grad():
        assert_near(merged(picture(3, 24, 24).float()).double(), model(picture(3, 24, 24)), 1e-5)
    merged.double()
    with torch.no_grad():
        assert_near(merged(picture(3, 24, 24)), model(picture(3, 24, 24)), 1e-5)


def test_to_another_device(merged):
    meta = copy.deepcopy(merged).to("meta")
    assert meta(torch.zeros(2, 3, 24, 24, device="meta", dtype=torch.float64)).shape == (2, 5)
    merged(picture(3, 24, 24))
    meta = merged.to("meta")
    assert meta(torch.zeros(2, 3, 24, 24, device="meta", dtype=torch.float64)).shape == (2, 5)


def test_a_model_on_the_meta_device():
    """There is nothing to compute with: a clear error, or a merged model on the meta device."""
    try:
        merged = merge(original().to("meta"))
    except nmconv.NmconvError:
        return
    assert merged(torch.zeros(2, 3, 24, 24, device="meta", dtype=torch.float64)).shape == (2, 5)


# Dtypes, layouts and batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(model, dtype):
    """Merged in float64 and cast once: as near to the truth as the sequential model of that dtype, by a factor."""
    lesser = copy.deepcopy(model).to(dtype)
    truth = copy.deepcopy(lesser).double()
    merged = merge(lesser)
    assert {value.dtype for value in merged.parameters()} == {dtype}
    x = picture(3, 24, 24).to(dtype)
    with torch.no_grad():
        wanted, found, sequential = truth(x.double()), merged(x).double(), lesser(x).double()
    scale = wanted.abs().max()
    apart = (found - wanted).abs().max() / scale
    assert apart <= max(4 * (sequential - wanted).abs().max() / scale, 20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, dtype):
    single = model.float()
    merged = merge(single)
    x = picture(3, 24, 24).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        wanted, found = single(x), merged(x)
        again = merged(x)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, again)
    assert_near(found.double(), wanted.double(), 30 * torch.finfo(dtype).eps)
    with torch.no_grad():
        assert_near(merged(x).double(), single(x).double(), 1e-4)


def test_channels_last(model):
    plain = merge(model)
    assert convs_are_last(plain) == {False}
    merged = merge(model.to(memory_format=torch.channels_last))
    assert convs_are_last(merged) == {True}  # as they were: else compiled code lays them out anew in every call
    x = picture(3, 24, 24).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_near(merged(x), model(x))
        assert merged.forward_features(x).is_contiguous(memory_format=torch.channels_last)
        assert_near(merged(x.contiguous()), model(x))
        assert_near(merged.to(memory_format=torch.channels_last)(x), model(x))
        assert_near(plain(x), model(x))


def convs_are_last(model):
    """Of the convolutions whose weights tell: whether they have their channels last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.modules.conv._ConvNd)]
    ways = [(value.is_contiguous(), value.is_contiguous(memory_format=last[value.dim()])) for value in weights]
    return {one for other, one in ways if one != other}


@pytest.mark.parametrize("rank", [2, 3])
def test_channels_last_is_kept_by_whatever_makes_a_convolution(rank, tmp_path):
    """Where the run has no weight that tells, too; baked, loaded, on the meta device."""
    cls, norm, shape = ((nn.Conv2d, nn.BatchNorm2d, (9, 8)), (nn.Conv3d, nn.BatchNorm3d, (8, 9, 8)))[rank - 2]
    layout = (torch.channels_last, torch.channels_last_3d)[rank - 2]

    def build():
        return settle(
            nn.Sequential(
                cls(3, 8, 3), nn.ReLU(), cls(8, 4, 1), norm(4), cls(4, 8, 3, groups=4), nn.ReLU(), cls(8, 4, 3)
            )
        ).to(memory_format=layout)

    model, x = build(), picture(3, *shape).to(memory_format=layout)
    wanted = model(x)
    merged = nmconv.merge(model, gate="always")
    path = tmp_path / "net.safetensors"
    nmconv.save(merged, path)
    found = {
        "merged": merged,
        "live, baked": nmconv.merge(nmconv.merge(model, gate="always", live=True), gate="always"),
        "loaded": nmconv.load(build(), path),
        "on meta": nmconv.merge(build().to("meta"), gate="always"),
    }
    for name, made in found.items():
        assert convs_are_last(made) == {True}, name
        if name != "on meta":
            assert type(made[3]) is not norm, name
            assert_near(made(x), wanted)
            assert_near(made(x.contiguous()), wanted)
    model[6].weight.data = model[6].weight.data.contiguous()  # some are and some are not: then as torch makes them
    assert convs_are_last(nmconv.merge(model, gate="always")) == {True, False}
    assert nmconv.merge(model, gate="always")[2].weight.is_contiguous()


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_channels_last_where_weights_are_computed(norm):
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(*(norm(layer) if isinstance(layer, nn.Conv2d) else layer for layer in layers))
    model = model.eval().to(memory_format=torch.channels_last)
    assert convs_are_last(merge(model)[0]) == {True}


@pytest.mark.parametrize("last", [False, True])
def test_the_latency_gate_times_what_will_run(last, monkeypatch):
    seen = []

    def runner(module, inputs, backend):
        if type(module) is not latency_gate._Call:  # the parts, and not the whole model
            seen.append((convs_are_last(module), inputs[0].is_contiguous(memory_format=torch.channels_last)))
        return timing.make_runner(module, inputs, backend)

    monkeypatch.setattr(latency_gate, "make_runner", runner)
    model = settle(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 3, 3), nn.ReLU()))
    x = picture(3, 16, 16)
    if last:
        model, x = (each.to(memory_format=torch.channels_last) for each in (model, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        nmconv.merge(model, gate="latency", example_inputs=x)
    assert seen == [({last}, last)] * 2


@pytest.mark.parametrize("live", [True, False])
def test_unbatched(live):
    """(C, H, W) without a batch, through a run with a border to correct and one without."""
    layers = [
        nn.Conv2d(3, 6, 1),
        nn.Dropout(),
        nn.Conv2d(6, 6, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.Conv2d(6, 2, 1),
    ]
    net = settle(nn.Sequential(*layers))
    merged = merge(net, live=live)
    assert convs_of(merged, 3, 24, 24) == 2
    with torch.no_grad():
        for size in (9, 24, 2):
            x = picture(3, size, size + 1)
            if size > 4:
                assert_near(merged(x[0]), net(x[0]))
                assert_near(merged(x), net(x))
            assert_near(merged[:3](x[0]), net[:3](x[0]))


def test_batches_of_other_sizes(merged, model):
    with torch.no_grad():
        for batch in (1, 2, 13, 0):
            x = picture(3, 24, 23, batch=batch)
            assert_near(merged(x), model(x))


def test_inference_mode_then_gradients(merged, model):
    """Whatever is kept from one call must serve the next."""
    x = picture(3, 24, 24)
    with torch.inference_mode():
        merged(x)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    merged(one).square().sum().backward()
    model(other).square().sum().backward()
    assert_near(one.grad, other.grad)
    with torch.no_grad():
        assert_near(merged(x), model(x))


def test_functional_call_and_vmap(merged, model):
    x = picture(3, 24, 24)
    parameters = {name: value.detach() * 1.0 for name, value in merged.named_parameters()}
    with torch.no_grad():
        assert_near(torch.func.functional_call(merged, parameters, (x,)), model(x))
        assert_near(torch.func.vmap(merged)(x.unsqueeze(1)).squeeze(1), model(x))


# Compilers -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", [slow("eager"), "aot_eager", slow("inductor")])
@pytest.mark.parametrize("live", [True, False])
def test_compile(model, backend, live):
    merged = merge(model, live=live)
    torch._dynamo.reset()
    compiled = torch.compile(merged, fullgraph=True, backend=backend)
    with torch.no_grad():
        for size in (24, 25, 40):
            x = picture(3, size, size)
            assert_near(compiled(x), model(x), 1e-9)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("live", [True, False])
def test_export(model, strict, live):
    merged = merge(model, live=live)
    x = picture(3, 24, 24)
    program = torch.export.export(merged, (x,), strict=strict)
    with torch.no_grad():
        assert_near(program.module()(x), model(x))
    dims, shapes = {0: torch.export.Dim("batch", max=64)}, [(2, 3, 24, 24), (3, 3, 24, 24)]
    if not torch.__version__.startswith("2.4."):  # its export guards the border's arithmetic against dynamic sizes
        dims[2] = torch.export.Dim("height", min=8, max=256)
        shapes += [(3, 3, 31, 24), (2, 3, 16, 24)]
    program = torch.export.export(merged, (x,), dynamic_shapes=(dims,), strict=strict)
    with torch.no_grad():
        for shape in shapes:
            y = picture(*shape[1:], batch=shape[0])
            assert_near(program.module()(y), model(y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("ran_before", [True, False])
def test_jit_trace(merged, model, ran_before):
    """At the size it was traced with, and at others as far as the original can."""
    x = picture(3, 24, 24)
    with torch.no_grad():
        if ran_before:
            merged(x)
        traced, sequential = torch.jit.trace(merged, x), torch.jit.trace(model, x)
        for shape in ((3, 24, 24), (3, 31, 25), (3, 12, 40)):
            assert_near(sequential(picture(*shape)), model(picture(*shape)))
            assert_near(traced(picture(*shape)), model(picture(*shape)))


def test_fx(merged, model):
    graph = torch.fx.symbolic_trace(merged)
    with torch.no_grad():
        assert_near(graph(picture(3, 24, 24)), model(picture(3, 24, 24)))
        assert_near(graph(picture(3, 31, 25)), model(picture(3, 31, 25)))


def test_mirrored_same_and_asymmetric_padding_compile():
    """The other kinds of padding a merged convolution may have."""
    from timm.layers import Conv2dSame

    nets = [
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")),
        nn.Sequential(nn.Conv2d(3, 4, 1), Conv2dSame(4, 3, 3, stride=2, bias=True)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ZeroPad2d((1, 0, 0, 2)), nn.Conv2d(4, 3, 3)),
    ]
    for net in nets:
        merged = merge(settle(net))
        torch._dynamo.reset()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
            for size in (12, 13, 20):
                assert_near(compiled(picture(3, size, size)), net(picture(3, size, size)))
            x = picture(3, 12, 13)
            assert_near(torch.export.export(merged, (x,)).module()(x), net(x))
        assert assert_agree(copy.deepcopy(merged), net, (3, 12, 13), (3, 5, 4))
