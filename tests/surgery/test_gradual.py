"""Gradual conversion: at slope 0 a model is the original to the bit, at slope 1 the hard conversion."""

import copy
import doctest
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from copies import pickled, saved
from hypothesis import HealthCheck, given, settings, strategies
from nets import conv, net
from oracle import assert_same
from oracle import test_random_nets as random_nets
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import nmconv

torch.set_num_threads(1)


# -- networks ----------------------------------------------------------------------------------------------------------


def plain(act=nn.ReLU, last=None):
    """Convolutions, norms and activations in a row."""
    parts = [conv(3), nn.BatchNorm2d(4), act(), conv(), nn.BatchNorm2d(4), act(), conv(), (last or act)(), conv()]
    return nn.Sequential(*parts)


def functional():
    def forward(self, x):
        x = F.relu(self.bn(self.one(x)))
        x = F.relu6(self.two(x), inplace=True)
        x = torch.relu_(self.three(x))
        return self.four(F.gelu(x))

    return net(forward, one=conv(3), bn=nn.BatchNorm2d(4), two=conv(), three=conv(), four=conv())


def shared(act=nn.ReLU):
    def forward(self, x):
        x = self.act(self.bn(self.one(x)))
        return self.four(self.act(self.three(self.act(self.two(x)) + x)))

    return net(forward, one=conv(3), bn=nn.BatchNorm2d(4), two=conv(), three=conv(), four=conv(), act=act())


def by_hand():
    def forward(self, x):
        x = self.one(x)
        x = x * torch.sigmoid(x)
        x = self.two(x)
        x *= torch.sigmoid(x)
        x = self.three(x)
        return self.four(x * F.relu6(x + 3) / 6)

    return net(forward, one=conv(3), two=conv(), three=conv(), four=conv())


def preactivated(inplace=True):
    """The shortcut reads the memory that the first ReLU overwrites, and no return value of it."""

    def forward(self, x):
        x = self.stem(x)
        self.act1(x)
        y = self.two(self.act2(self.bn(self.one(x))))
        y = y + x
        F.relu_(y)
        return self.three(y) + y

    parts = {"one": conv(), "two": conv(), "three": conv(), "bn": nn.BatchNorm2d(4)}
    parts |= {"act1": nn.ReLU(inplace), "act2": nn.ReLU(inplace)}
    return net(forward, stem=nn.Sequential(conv(3), nn.BatchNorm2d(4)), **parts)


class Bend(nn.Module):
    """An activation of somebody's own."""

    def forward(self, x):
        return x * torch.tanh(F.softplus(x))


def moving():
    """Units that end without an activation: in a Sequential, and in a forward."""

    def forward(self, x):
        x = self.body(x)
        return self.out(self.four(F.relu(self.three(x))) + x)

    body = nn.Sequential(conv(3), nn.GELU(), conv(), nn.BatchNorm2d(4))
    return net(forward, body=body, three=conv(), four=conv(), out=conv())


def norm_act():
    return timm.create_model("mobilenetv2_035")


def torchvision_resnet():
    return torchvision.models.resnet18()


NETS = {
    "modules": plain,
    "in place": lambda: plain(lambda: nn.ReLU(True)),
    "prelu": lambda: plain(nn.PReLU),
    "silu in place": lambda: plain(lambda: nn.SiLU(True), nn.Softplus),
    "timm's": lambda: plain(timm.layers.Mish, timm.layers.GELU),
    "somebody's": lambda: plain(Bend),
    "functional": functional,
    "shared": shared,
    "shared in place": lambda: shared(lambda: nn.ReLU(True)),
    "shared prelu": lambda: shared(nn.PReLU),
    "by hand": by_hand,
    "preactivated": preactivated,
    "moving": moving,
    "norm and act": norm_act,
    "resnet of timm": lambda: timm.create_model("resnet18"),
    "preactivated resnet": lambda: timm.create_model("resnetv2_18"),
    "resnet of torchvision": torchvision_resnet,
}


def built(name):
    torch.manual_seed(0)
    model = NETS[name]()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    return model.eval()


def plan_of(model, **options):
    """A plan that drops or moves all that it can."""
    plan = nmconv.make_plan(model, "4:1", **options)
    more = {s.id: "drop" for s in plan.sites if s.is_real and not s.locked and s.action == "keep"}
    return plan.edit(more)


def pair(name, **options):
    """The original, the hard conversion, and the gradual one."""
    model = built(name)
    plan = plan_of(model, **options)
    assert plan.changes, plan
    soft = nmconv.apply_plan(model, plan, gradual=True)
    assert set(nmconv.get_slopes(soft)) == {site.id for site in plan.changes}
    return model, nmconv.apply_plan(model, plan), soft


def picture(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def outcome(model, x, training=False, dtype=None):
    """What a step gives: the output, all gradients, and the buffers afterwards."""
    model = copy.deepcopy(model).train(training)
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(x)
    output.backward(torch.randn_like(output) / output.numel())  # laid out as the output is
    gradients = {"input": x.grad} | {name: value.grad for name, value in model.named_parameters()}
    buffers = {name: value for name, value in model.named_buffers() if "_nmconv_" not in name}
    return output.detach(), gradients, buffers


def same(found, expected):
    """Equal to the bit; a parameter that nobody reads has no gradient, or zeros."""
    assert found[0].dtype == expected[0].dtype
    assert equal(found[0], expected[0])
    for one, other in ((found[1], expected[1]), (found[2], expected[2])):
        assert one.keys() == other.keys()
        for name in one:
            if one[name] is None or other[name] is None:
                assert all(value is None or not value.any() for value in (one[name], other[name])), name
            else:
                assert equal(one[name], other[name]), name


def equal(one, other):
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) and torch.equal(one.isnan(), other.isnan())


# -- both ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relocate", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_both_ends_are_exact(name, relocate):
    model, hard, soft = pair(name, relocate=relocate)
    x = picture()
    assert list(soft.state_dict()) == list(model.state_dict())
    for training in (False, True):
        nmconv.set_slope(soft, 0)
        same(outcome(soft, x, training), outcome(model, x, training))
        nmconv.set_slope(soft, 1)
        same(outcome(soft, x, training), outcome(hard, x, training))
        nmconv.set_slope(soft, 0.5)
        output, gradients, _ = outcome(soft, x, training)
        assert not torch.equal(output, outcome(hard, x, training)[0])
        assert all(value is None or value.isfinite().all() for value in gradients.values())


def test_activations_move_by_degrees():
    _, _, soft = pair("moving", relocate=True)
    assert [site.action for site in nmconv.get_plan(soft).changes] == ["move", "move"]
    nmconv.set_slope(soft, 0.25)
    z = soft.moved_act(x := torch.randn(2, 4, 5, 5))
    assert torch.equal(z, torch.lerp(F.gelu(x), x, 0.75))
    _, _, soft = pair("norm and act", relocate=True)
    slots = {path for path, part in soft.named_modules() if "_nmconv_slopes" in part.__dict__ and "bn3" in path}
    assert slots  # filled ones of norms with activations


def test_between_the_ends_a_relu_is_leaky():
    model = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU())
    soft = nmconv.convert(model, "2:1", gradual=True, keep="boundary")
    nmconv.set_slope(soft, 0.3)
    leaky = nn.Sequential(model[0], nn.LeakyReLU(0.3), model[2], model[3])
    torch.testing.assert_close(soft(picture()), leaky(picture()))


@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.PReLU, Bend])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e30])
def test_what_is_not_selected_does_not_leak(act, value):
    """0 · inf is NaN: neither outputs nor gradients may be computed with weights."""
    torch.manual_seed(0)
    parts = [nn.Identity(), conv(1, 1, 1), act(), conv(1, 1, 1), nn.ReLU6()]
    with torch.no_grad():
        parts[1].weight.fill_(1.0)
        parts[1].bias.zero_()
    model = nn.Sequential(*parts)
    hard, soft = nmconv.convert(model, "2:1"), nmconv.convert(model, "2:1", gradual=True)
    x = torch.tensor([value, 1.0, -1.0, 0.0]).reshape(1, 1, 2, 2)
    for slope, reference in ((0, model), (1, hard)):
        nmconv.set_slope(soft, slope)
        same(outcome(soft, x, True), outcome(reference, x, True))


@pytest.mark.parametrize("name", ["modules", "in place", "functional", "by hand", "preactivated", "moving", "prelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(name, dtype):
    model, hard, soft = pair(name, relocate=True)
    x = picture() * 3e4  # float16 overflows
    assert not outcome(model, x, dtype=dtype)[0].isfinite().all() or dtype is torch.bfloat16
    for training in (False, True):
        for slope, reference in ((0, model), (1, hard)):
            nmconv.set_slope(soft, slope)
            same(outcome(soft, x, training, dtype), outcome(reference, x, training, dtype))


@pytest.mark.parametrize("name", ["modules", "in place", "functional", "preactivated", "moving", "norm and act"])
def test_channels_last(name):
    model, hard, soft = (each.to(memory_format=torch.channels_last) for each in pair(name, relocate=True))
    x = picture(size=96).to(memory_format=torch.channels_last)  # of one position, layouts cannot be told
    layouts = [[], [], []]
    for each, seen in zip((model, hard, soft), layouts, strict=True):
        for part in each.modules():
            if isinstance(part, nn.Conv2d):
                part.register_forward_hook(
                    lambda m, i, o, seen=seen: seen.append(i[0].is_contiguous(memory_format=torch.channels_last))
                )
    same(outcome(soft, x), outcome(model, x))
    nmconv.set_slope(soft, 1)
    same(outcome(soft, x), outcome(hard, x))
    assert layouts[2] == layouts[0] + layouts[1]


@pytest.mark.parametrize("name", ["resnet of timm", "norm and act"])
def test_checkpointing(name):
    model, hard, soft = pair(name)
    x = picture()
    for slope, reference in ((0, model), (1, hard), (0.5, None)):
        nmconv.set_slope(soft, slope)
        expected = outcome(soft if reference is None else reference, x, True)
        soft.set_grad_checkpointing()
        same((*outcome(soft, x, True)[:2], expected[2]), expected)  # a block that runs twice counts batches twice
        soft.set_grad_checkpointing(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["prelu", "functional", "moving"])
def test_other_types(name, dtype):
    model, hard, soft = (each.to(dtype) for each in pair(name, relocate=True))
    x = picture().to(dtype)
    for slope, reference in ((0, model), (1, hard)):
        nmconv.set_slope(soft, slope)
        same(outcome(soft, x), outcome(reference, x))
    nmconv.set_slope(soft, 0.3)
    assert outcome(soft, x)[0].dtype == dtype
    assert all(value.dtype is torch.float32 for name, value in soft.named_buffers() if "_nmconv_" in name)


def test_a_slope_may_change_between_the_passes():
    _, _, soft = pair("shared in place")
    x = picture()
    nmconv.set_slope(soft, 0.5)
    expected = outcome(soft, x)[1]
    output = soft(x)
    nmconv.set_slope(soft, 1)
    torch.manual_seed(0)
    output.backward(torch.randn_like(output) / output.numel())
    assert all(equal(value.grad, expected[name]) for name, value in soft.named_parameters())


# -- slopes ------------------------------------------------------------------------------------------------------------


def test_slopes_are_set_and_read():
    _, _, soft = pair("functional")
    sites = list(nmconv.get_slopes(soft))
    buffers = dict(soft.named_buffers())
    nmconv.set_slope(soft, {sites[1]: 0.25})
    assert nmconv.get_slopes(soft) == dict.fromkeys(sites, 0.0) | {sites[1]: 0.25}
    assert sorted(value.item() for name, value in soft.named_buffers() if "_nmconv_" in name) == [0, 0, 0, 0.25]
    nmconv.set_slope(soft, 1)
    assert all(value is buffers[name] for name, value in soft.named_buffers())
    around = nn.ModuleDict({"net": soft})
    nmconv.set_slope(around, 0.5)
    assert set(nmconv.get_slopes(around).values()) == {0.5}


@pytest.mark.parametrize("slope", [-0.1, 1.1, float("nan"), True, "0.5", None, {"no such": 0.5}, {":relu#1": 2}])
def test_what_is_no_slope_is_refused(slope):
    _, _, soft = pair("functional")
    nmconv.set_slope(soft, 0.5)
    with pytest.raises(nmconv.OptionError):
        nmconv.set_slope(soft, slope)
    assert set(nmconv.get_slopes(soft).values()) == {0.5}
    assert {value.item() for name, value in soft.named_buffers() if "_nmconv_" in name} == {0.5}


def test_what_is_not_gradual_has_no_slopes():
    model = plain()
    assert nmconv.get_slopes(model) == {} == nmconv.get_slopes(nmconv.convert(model))
    with pytest.raises(nmconv.OptionError, match="gradual=True"):
        nmconv.set_slope(model, 0.5)
    with pytest.raises(nmconv.OptionError, match="gradual=True"):
        nmconv.Gradual(nmconv.convert(model), 10)
    with pytest.raises(nmconv.ModelTypeError):
        nmconv.set_slope("model", 0.5)


# -- copies, files, devices --------------------------------------------------------------------------------------------


def emptied(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    made = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    made.load_state_dict(state)
    return made


def rounded(model):
    return copy.deepcopy(model).half().float()


def loaded(model):
    made = copy.deepcopy(model)
    made.load_state_dict(copy.deepcopy(model).state_dict(), assign=True)
    return made


@pytest.mark.parametrize("name", ["prelu", "resnet of torchvision", "norm and act"])
@pytest.mark.parametrize("made", [copy.deepcopy, pickled, saved, emptied, rounded, loaded])
def test_copies_have_the_slopes(name, made):
    _, _, soft = pair(name, relocate=True)
    nmconv.set_slope(soft, 0.3)
    again = made(soft)
    assert nmconv.get_slopes(again) == nmconv.get_slopes(soft)
    slopes = {value for name, value in again.named_buffers() if "_nmconv_" in name}
    assert all(torch.equal(value, torch.tensor(0.3)) for value in slopes)
    assert again.state_dict().keys() == soft.state_dict().keys()
    if made is not rounded:
        same(outcome(again, picture(), True), outcome(soft, picture(), True))
    nmconv.set_slope(again, 1)
    assert set(nmconv.get_slopes(soft).values()) == {0.3}


@pytest.mark.parametrize("name", ["prelu", "shared", "moving", "norm and act"])
@pytest.mark.parametrize("witness", [False, True])
def test_files_have_the_slopes(name, witness, tmp_path):
    _, hard, soft = pair(name, relocate=True)
    nmconv.set_slope(soft, {site: at / 100 for at, site in enumerate(nmconv.get_slopes(soft))})
    nmconv.save(soft, tmp_path / "soft")
    again = nmconv.load(NETS[name]().eval(), tmp_path / "soft", witness=witness)
    assert nmconv.get_slopes(again) == nmconv.get_slopes(soft)
    same(outcome(again, picture()), outcome(soft, picture()))
    with torch.device("meta"):
        empty = NETS[name]()
    again = nmconv.load(empty.eval(), tmp_path / "soft", witness=witness)
    same(outcome(again, picture()), outcome(soft, picture()))
    nmconv.save(hard, tmp_path / "hard")
    assert nmconv.get_slopes(nmconv.load(NETS[name]().eval(), tmp_path / "hard", witness=witness)) == {}


@pytest.mark.parametrize("slopes", [[["2#1", 0.5]], [["2#1", 2.0], ["5#1", 0.0], ["7#1", 0.0]], "x", [["2#1", None]]])
def test_files_with_other_slopes_are_damaged(slopes, tmp_path):
    _, _, soft = pair("modules")
    nmconv.save(soft, tmp_path / "soft")
    with safetensors.safe_open(tmp_path / "soft", "pt") as file:
        said = json.loads(file.metadata()["nmconv"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said["slopes"] = slopes
    save_file(tensors, tmp_path / "other", {"nmconv": json.dumps(said)})
    with pytest.raises(nmconv.FileError, match="slopes"):
        nmconv.load(plain().eval(), tmp_path / "other")


def test_in_place_keeps_modules_and_parameters():
    for name in ("prelu", "shared", "moving", "resnet of torchvision"):
        model = built(name)
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        plan = plan_of(model, relocate=True)
        expected = nmconv.apply_plan(copy.deepcopy(model), plan, gradual=True)
        assert nmconv.apply_plan(model, plan, gradual=True, inplace=True) is model
        assert all(value is parameters[name] for name, value in model.named_parameters())
        assert all(part is modules[name] for name, part in model.named_modules() if part._parameters)
        assert list(model.state_dict()) == list(expected.state_dict())
        nmconv.set_slope(model, 0.5)
        nmconv.set_slope(expected, 0.5)
        same(outcome(model, picture()), outcome(expected, picture()))


def test_an_activation_in_two_slots():
    shared = nn.PReLU()
    model = nn.Sequential(conv(3), shared, conv(), shared).eval()
    hard, soft = (
        nmconv.convert(model, "3:1", keep="boundary"),
        nmconv.convert(model, "3:1", gradual=True, keep="boundary"),
    )
    assert list(soft.state_dict()) == list(model.state_dict()) and soft[1].weight is soft[3].weight
    assert nmconv.get_slopes(soft) == {"1#1": 0.0}
    for slope, reference in ((0, model), (1, hard)):
        nmconv.set_slope(soft, slope)
        same(outcome(soft, picture()), outcome(reference, picture()))
    nmconv.Gradual(soft, 1, end=0).finish()
    assert repr(soft) == repr(hard)


@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU])
def test_one_module_with_a_site_in_each_mode(act):
    def forward(self, x):
        x = self.one(x)
        if self.training:
            x.clamp_(-1, 1)
        x = self.act(x)
        return self.two(x) + self.aux(x) if self.training else self.two(x)

    aux = nn.Sequential(conv(), nn.ReLU(), conv())
    model = net(forward, one=conv(3), two=conv(), act=act(), aux=aux).eval()
    plan = nmconv.make_plan(model, "1:1")
    plan = plan.edit({site.id: "drop" for site in plan.sites if site.is_real})
    hard, soft = nmconv.apply_plan(model, plan), nmconv.apply_plan(model, plan, gradual=True)
    assert nmconv.get_slopes(soft) == {"act#1": 0.0, "act#1(train)": 0.0, "aux.1#1(train)": 0.0}
    for training, site in ((False, "act#1"), (True, "act#1(train)")):
        same(outcome(soft, picture(), training), outcome(model, picture(), training))
        nmconv.set_slope(soft, {site: 1, "aux.1#1(train)": 1})
        same(outcome(soft, picture(), training), outcome(hard, picture(), training))
        nmconv.set_slope(soft, {"aux.1#1(train)": 0})
    nmconv.Gradual(soft, 1, end=0).finish()
    assert repr(soft) == repr(hard)


@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU])
def test_hooks_stay(act):
    model, seen = plain(act).eval(), []
    handle = model[2].register_forward_hook(lambda module, args, output: seen.append(output))
    hooked = nmconv.convert(model, "4:1", gradual=True, inplace=True)
    output = hooked(picture())
    assert len(seen) == 1 and torch.equal(hooked[3:](seen[0]), output)
    nmconv.Gradual(hooked, 1, end=0).finish()
    hooked(picture())
    handle.remove()
    hooked(picture())
    assert len(seen) == 2


# -- compilers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["modules", "in place", "functional", "by hand", "preactivated", "moving"])
def test_compiled_once(name):
    torch._dynamo.reset()
    model, hard, soft = pair(name, relocate=True)
    counter = CompileCounter()
    compiled = torch.compile(soft, fullgraph=True, backend=counter)
    x = picture()
    for slope in (0, 0.1, 0.25, 0.9, 1, 0):
        nmconv.set_slope(compiled, slope)
        output = compiled(x)
        assert torch.equal(output, soft(x))
        (output**2).mean().backward()
        if slope in (0, 1):
            assert torch.equal(output, (hard if slope else model)(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_bakes_the_slope_in(strict, tmp_path):
    torch._dynamo.reset()
    _, _, soft = pair("moving", relocate=True)
    nmconv.set_slope(soft, 0.5)
    x = picture()
    expected = soft(x)
    torch.export.save(torch.export.export(soft, (x,), strict=strict), tmp_path / "soft.pt2")
    nmconv.set_slope(soft, 1)
    assert torch.equal(torch.export.load(tmp_path / "soft.pt2").module()(x), expected)


# -- the witness -------------------------------------------------------------------------------------------------------


def forgets(model):
    model[5].__class__ = type(model[5])._nmconv_base
    del model[5].__dict__["_nmconv_slopes"], model[5].__dict__["_nmconv_gradual"]


def one_more(model):
    model[3].__class__ = nn.Conv2d
    model[4] = nn.Identity()


def other_settings(model):
    model[0].stride = (2, 2)


@pytest.mark.parametrize("tampered", [forgets, one_more, other_settings])
def test_the_witness_sees_tampering(tampered):
    model, hard, soft = pair("modules")
    nmconv.verify(model, soft, picture())
    nmconv.verify(copy.deepcopy(soft), soft, picture())
    with pytest.raises(nmconv.WitnessError):
        nmconv.verify(hard, soft, picture())
    tampered(soft)
    with pytest.raises(nmconv.WitnessError):
        nmconv.verify(model, soft, picture())


@pytest.mark.parametrize("wrong", ["x", "y", "memory", "not held"])
def test_the_witness_sees_wrong_mixes(wrong, monkeypatch):
    from nmconv.surgery import method_edits

    real = method_edits._mix

    def mix(tracer, act, value, slope, *, into):
        real(tracer, act, value, slope, into=into != (wrong == "memory"))
        made = next(node for node in act.users if node.args[0] is value)
        other = next(node for node in tracer.graph.nodes if node.op == "call_module")
        if wrong == "x":
            made.args = (other, act, made.args[2])
        elif wrong == "y":
            made.args = (value, other, made.args[2])
        elif wrong == "not held":
            act.replace_input_with(act.all_input_nodes[0], other)

    monkeypatch.setattr(method_edits, "_mix", mix)

    def forward(self, x):
        x = self.two(self.one(x))
        y = F.relu(x, inplace=True)
        return self.four(self.three(y) + x)

    model = net(forward, one=conv(3), two=conv(), three=conv(), four=conv())
    plan = nmconv.make_plan(model, "4:1")
    plan = plan.edit({site.id: "drop" for site in plan.sites})
    before = model.state_dict()
    with pytest.raises(nmconv.WitnessError):
        nmconv.apply_plan(model, plan, gradual=True, inplace=True)
    assert nmconv.get_slopes(model) == {} and list(model.state_dict()) == list(before)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_padding_cannot_move_by_degrees():
    model = plain()
    with pytest.raises(nmconv.OptionError, match="padding moves at once"):
        nmconv.convert(model, "2:1", gradual=True, hoist_padding=True)
    plan = nmconv.make_plan(model, "2:1", hoist_padding=True)
    with pytest.raises(nmconv.OptionError, match="padding moves at once"):
        nmconv.apply_plan(model, plan, gradual=True, inplace=True)
    assert nmconv.get_plan(model) is None


def test_random_activations_are_refused_by_name():
    with nmconv.register(nn.RReLU, "activation"):
        model = plain(nn.RReLU)
        nmconv.convert(model, "2:1")
        with pytest.raises(nmconv.OptionError, match="RReLU"):
            nmconv.convert(model, "2:1", gradual=True, inplace=True)
        assert nmconv.get_plan(model) is None and type(model[2]) is nn.RReLU


@pytest.mark.parametrize("slope", [0, 0.5, 1])
def test_until_it_is_finished(slope):
    model = nn.Sequential(conv(3), nn.ReLU(), conv(4, 4, 1), nn.ReLU(), conv()).eval()
    hard, soft = nmconv.convert(model), nmconv.convert(model, gradual=True)
    nmconv.set_slope(soft, slope)
    data = picture(8)
    for call in (nmconv.merge, nmconv.fold_norms, nmconv.find_runs):
        with pytest.raises(nmconv.MergeError, match=r"call finish\(\) first"):
            call(soft)
    with pytest.raises(nmconv.FitError, match=r"call finish\(\) first"):
        nmconv.fit(soft, data, reference=model)
    with pytest.raises(nmconv.AlreadyConvertedError):
        nmconv.convert(soft)
    assert set(nmconv.get_slopes(soft).values()) == {slope}
    nmconv.Gradual(soft, 1, end=0).finish()
    same(outcome(nmconv.merge(soft, gate="always"), data), outcome(nmconv.merge(hard, gate="always"), data))


def test_nothing_to_change():
    with pytest.warns(nmconv.NoEffectWarning):
        same = nmconv.convert(plain(), "1:1", gradual=True)
    assert nmconv.get_slopes(same) == {}
    gradual = nmconv.Gradual(same, 10, followers=[copy.deepcopy(same)])
    gradual.step_update(5)
    gradual.finish()
    with pytest.raises(nmconv.OptionError, match="at 1:1, drops nothing"):
        nmconv.set_slope(same, 0.5)
    with pytest.raises(nmconv.OptionError, match="no gradual sites"):
        nmconv.Gradual(same, 10, followers=[plain()])


# -- finishing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relocate", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_finished_is_converted(name, relocate):
    _, hard, soft = pair(name, relocate=relocate)
    parameters = dict(soft.named_parameters())
    schedule = nmconv.Gradual(soft, 1)
    schedule.step_update(1)
    schedule.finish()
    schedule.finish()
    schedule.step_update(1)
    assert repr(soft) == repr(hard)
    assert nmconv.get_plan(soft) == nmconv.get_plan(hard) and nmconv.get_slopes(soft) == {}
    for (path, one), (other_path, other) in zip(soft.named_modules(), hard.named_modules(), strict=True):
        assert path == other_path and type(one) is type(other) and vars(one).keys() == vars(other).keys(), path
        assert one._non_persistent_buffers_set == other._non_persistent_buffers_set
    assert all(value is parameters[name] for name, value in soft.named_parameters())
    same(outcome(soft, picture(), True), outcome(hard, picture(), True))
    nmconv.verify(built(name), soft)


def test_a_schedule_takes_the_model_inside():
    _, _, soft = pair("modules")
    wrapped = nn.DataParallel(soft)
    nmconv.set_slope(wrapped, 0.5)
    with pytest.raises(nmconv.ModelTypeError, match=r"model\.module"):
        nmconv.Gradual(wrapped, 1)
    with pytest.raises(nmconv.ModelTypeError, match=r"model\._orig_mod"):
        nmconv.Gradual(nn.ModuleDict({"net": torch.compile(soft)}), 1)
    assert set(nmconv.get_slopes(soft).values()) == {0.5}
    soft.compile(backend="eager")
    schedule = nmconv.Gradual(soft, 1)
    schedule.step_update(1)
    schedule.finish()
    assert nmconv.get_slopes(soft) == {}


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_schedules():
    _, _, soft = pair("modules")
    schedule = nmconv.Gradual(soft, 100, schedule="linear", start=0.1, end=0.6)
    assert [schedule.slope_at(n) for n in (0, 10, 60, 100, 200)] == [0, 0, 1, 1, 1]
    assert schedule.slope_at(35) == pytest.approx(0.5)
    schedule.step_update(35, metric=0.1)
    assert set(nmconv.get_slopes(soft).values()) == {schedule.slope_at(35)}
    cosine = nmconv.Gradual(soft, 100)
    assert set(nmconv.get_slopes(soft).values()) == {0.0}
    assert [cosine.slope_at(n) for n in (0, 60, 80)] == [0, 1, 1]
    assert cosine.slope_at(30) == pytest.approx(0.5) and cosine.slope_at(15) == pytest.approx(0.1464466)
    assert nmconv.Gradual(soft, 10, start=0.5, end=0.5).slope_at(5) == 1


def test_the_state_of_a_schedule():
    _, _, soft = pair("modules")
    schedule = nmconv.Gradual(soft, 100, schedule="linear", end=0.8)
    schedule.step_update(40)
    state = json.loads(json.dumps(schedule.state_dict()))
    again = copy.deepcopy(soft)
    other = nmconv.Gradual(again, 50)
    other.load_state_dict(state)
    assert nmconv.get_slopes(again) == nmconv.get_slopes(soft) and other.slope_at(60) == schedule.slope_at(60)
    for wrong in ({}, {**state, "step": -1}, {**state, "schedule": "none"}, None):
        with pytest.raises(nmconv.OptionError):
            other.load_state_dict(wrong)
    assert other.state_dict() == schedule.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"total_steps": 0},
        {"total_steps": 1.5},
        {"schedule": "square"},
        {"start": -0.1},
        {"end": 1.1},
        {"start": 0.5, "end": 0.4},
        {"followers": [nn.Identity()]},
        {"end": float("nan")},
    ],
)
def test_options_are_checked(options):
    _, _, soft = pair("modules")
    nmconv.set_slope(soft, 0.5)
    with pytest.raises(nmconv.OptionError):
        nmconv.Gradual(soft, **{"total_steps": 10, **options})
    assert set(nmconv.get_slopes(soft).values()) == {0.5}


def test_warnings():
    _, _, soft = pair("modules")
    with pytest.warns(nmconv.SlopeWarning, match="0.95"):
        schedule = nmconv.Gradual(soft, 10, end=0.95)
    schedule.step_update(3)
    with pytest.warns(nmconv.SlopeWarning, match="outputs change"):
        schedule.finish()


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
@pytest.mark.parametrize("name", ["prelu", "shared", "resnet of timm"])
def test_averages_follow(version, name):
    _, hard, soft = pair(name)
    ema = getattr(timm.utils, version)(soft, decay=0.5)
    schedule = nmconv.Gradual(soft, 4, end=0.8, followers=[ema.module])
    optimizer = torch.optim.SGD(soft.train().parameters(), lr=0.01)
    for n in range(1, 5):
        soft(picture()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(n)
        ema.update(soft)
        assert nmconv.get_slopes(ema.module) == nmconv.get_slopes(soft)
    schedule.finish()
    hard.load_state_dict(ema.module.state_dict())
    same(outcome(ema.module, picture()), outcome(hard, picture()))
    ema.update(soft)


def follows(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    _, hard, soft = pair("shared prelu")
    _, other, second = pair("prelu")
    for made, expected in ((soft, hard), (second, other)):
        wrapped = nn.parallel.DistributedDataParallel(made.train())
        schedule = nmconv.Gradual(made, 6, schedule="linear", end=0.5)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
        x = picture() + rank
        for n in range(1, 7):
            with wrapped.no_sync():
                wrapped(x).square().mean().backward()
            wrapped(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step_update(n)
        numbers = torch.cat([value.detach().flatten() for value in made.parameters()])
        both = [torch.empty_like(numbers) for _ in range(2)]
        dist.all_gather(both, numbers)
        assert torch.equal(*both)
        schedule.finish()
        expected.load_state_dict(made.state_dict())
        same(outcome(made, x), outcome(expected, x))
    (folder / f"done{rank}").write_text("")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(follows, (tmp_path,), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


# -- the docs ----------------------------------------------------------------------------------------------------------


def snippet(heading):
    """The code below a heading of docs/training.md."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    return text.partition(f"## {heading}\n")[2].partition("```python\n")[2].partition("```")[0]


def trained(model, begin, after, end, count):
    """A loop that a trainer runs; the slopes on the way."""
    found = []
    begin()
    for n in range(1, 11):
        model(picture()).square().mean().backward()
        count(n)
        after()
        found.append(min(nmconv.get_slopes(model).values()))
    end()
    return found


def test_the_callback_for_lightning():
    _, hard, soft = pair("modules")
    lightning = SimpleNamespace(Callback=object)
    space = {"lightning": lightning, "nmconv": nmconv}
    exec(snippet("Lightning"), space)
    callback = space["GradualCallback"](schedule="linear", end=0.5)
    module = nn.ModuleDict({"net": soft})
    trainer = SimpleNamespace(estimated_stepping_batches=10, global_step=0)
    found = trained(
        soft,
        lambda: callback.on_fit_start(trainer, module),
        lambda: callback.on_train_batch_end(trainer, module, None, None, 0),
        lambda: callback.on_train_end(trainer, module),
        lambda n: setattr(trainer, "global_step", n),
    )
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])
    assert repr(soft) == repr(hard)


def test_the_callback_for_the_trainer_of_hugging_face():
    _, hard, soft = pair("modules")
    space = {"transformers": SimpleNamespace(TrainerCallback=object), "nmconv": nmconv}
    exec(snippet("Hugging Face Trainer"), space)
    callback = space["GradualCallback"](soft, schedule="linear", end=0.5)
    state = SimpleNamespace(max_steps=10, global_step=0)
    found = trained(
        soft,
        lambda: callback.on_train_begin(None, state, None, model=soft, optimizer=None),
        lambda: callback.on_step_end(None, state, None, model=soft, optimizer=None),
        lambda: callback.on_train_end(None, state, None, model=soft, optimizer=None),
        lambda n: setattr(state, "global_step", n),
    )
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])
    assert repr(soft) == repr(hard)


@pytest.mark.parametrize(
    "documented", [nmconv.Gradual, nmconv.get_slopes, nmconv.set_slope], ids=lambda one: one.__name__
)
def test_examples_run(documented):
    found = doctest.DocTestFinder(recurse=False).find(documented, globs={})
    assert found and all(test.examples for test in found)
    for test in found:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_norms_are_recalibrated_while_it_is_gradual():
    _, _, soft = pair("modules")
    nmconv.set_slope(soft, 0.5)
    before = soft[1].running_mean.clone()
    nmconv.recalibrate_norms(soft, picture(16))
    assert not torch.equal(soft[1].running_mean, before) and set(nmconv.get_slopes(soft).values()) == {0.5}


# -- random networks ---------------------------------------------------------------------------------------------------


@settings(max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(source=random_nets.sources(), ratio=strategies.sampled_from(("2:1", "3:1", "100:1")), move=strategies.booleans())
def test_random_nets(source, ratio, move):
    model, x = random_nets.build(source), random_nets.picture()
    try:
        plan = random_nets.quiet(nmconv.make_plan, model, ratio, relocate=move, example_inputs=x)
    except nmconv.NoSitesError:
        return
    hard = random_nets.quiet(nmconv.apply_plan, model, plan, example_inputs=x)
    soft = random_nets.quiet(nmconv.apply_plan, model, plan, gradual=True, example_inputs=x)
    for slope, reference in ((0, model), (1, hard)) if plan.changes else ():
        nmconv.set_slope(soft, slope)
        for training in (False, True):
            (found, buffers, _), (expected, others, _) = (random_nets.run(each, training) for each in (soft, reference))
            assert_same(found, expected)
            assert_same({name: value for name, value in buffers.items() if "_nmconv_" not in name}, others)
        found, error = random_nets.gradients(soft)
        expected, _ = random_nets.gradients(reference)
        if expected is not None:
            assert error is None and expected.keys() <= found.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, expected.get(name, torch.zeros_like(value)), rtol=1e-4, atol=1e-6)
