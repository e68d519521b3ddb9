"""Activations that a forward works out by hand: ``x * torch.sigmoid(x)`` is SiLU, and no gate."""

import copy
import math
import threading
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from calls import calls_of
from oracle import assert_same, dropped, record
from torch import nn

import nmconv

X = torch.rand(2, 4, 9, 9) - 0.5
conv = partial(nn.Conv2d, 4, 4, 3, padding=1)


class Block(nn.Module):
    """Two convolutions, each with an activation that the test's function works out."""

    def __init__(self, work, **parts):
        super().__init__()
        self.a, self.b, self.n = conv(), conv(), nn.BatchNorm2d(4)
        self.scale = 6
        for name, part in parts.items():
            setattr(self, name, part)
        self._work = work

    def forward(self, x):
        return self._work(self, self.b(self._work(self, self.n(self.a(x)))))


class Net(nn.Module):
    """A block between two convolutions."""

    def __init__(self, work, **parts):
        super().__init__()
        self.stem, self.block, self.head = conv(), Block(work, **parts), conv()

    def forward(self, x):
        return self.head(self.block(self.stem(x)))


def gate_module():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())


def assigned(s, x):
    gate = torch.sigmoid(x)
    x = x * gate
    return x


def inplace_inside(s, x):
    return x * F.relu6(x + 3, inplace=True).div_(6)


def inplace_on_the_gate(s, x):
    return torch.sigmoid(x).mul_(x)


def operator_inplace(s, x):
    x *= x.sigmoid()
    return x


SILU = {
    "torch.sigmoid": lambda s, x: x * torch.sigmoid(x),
    "method, other order": lambda s, x: x.sigmoid() * x,
    "F.sigmoid": lambda s, x: torch.mul(x, F.sigmoid(x)),
    "nn.Sigmoid": lambda s, x: x * s.sigmoid(x),
    "assigned": assigned,
    "quotient": lambda s, x: x / (1 + torch.exp(-x)),
    "in-place on the gate": inplace_on_the_gate,
    "a helper": lambda s, x: swish(x),
}
INPLACE = {
    "mul_": lambda s, x: x.mul_(x.sigmoid()),
    "*=": operator_inplace,
}
OTHERS = {
    "hardswish": {
        "six behind": lambda s, x: x * F.relu6(x + 3) / 6,
        "six inside": lambda s, x: x * (F.relu6(x + 3) / 6),
        "in-place inside": inplace_inside,
        "by a setting": lambda s, x: x * F.relu6(x + 3) / s.scale,
        "hardsigmoid": lambda s, x: x * F.hardsigmoid(x),
        "clamp": lambda s, x: x * (x + 3).clamp(0, 6) * (1 / 6),
    },
    "mish": {"softplus": lambda s, x: x * torch.tanh(F.softplus(x)), "module": lambda s, x: x * s.softplus(x).tanh()},
    "gelu": {
        "erf": lambda s, x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "tanh": lambda s, x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    },
    "expression": {
        "quick": lambda s, x: x * torch.sigmoid(1.702 * x),
        "squared": lambda s, x: F.relu(x) * F.relu(x),
        "leaky": lambda s, x: torch.maximum(x, 0.1 * x),
    },
}


def swish(x):
    return x * torch.sigmoid(x)


def net(act):
    return Net(act, sigmoid=nn.Sigmoid(), softplus=nn.Softplus(), gate=gate_module()).eval()


def plan_of(model, x=X):
    return nmconv.make_plan(model, "2:1", example_inputs=x)


def real(model):
    return [(site.id, site.kind) for site in plan_of(model).sites if site.is_real]


def all_dropped(model, x=X):
    """The model with each of its activations dropped, and the plan."""
    plan = plan_of(model, x)
    plan = plan.edit({site.id: "drop" for site in plan.sites if site.is_real})
    return nmconv.apply_plan(model, plan, example_inputs=x), plan


def check_dropped(model, x=X):
    """All activations go; the oracle, which finds them at run time by what they give, agrees in both modes."""
    converted, plan = all_dropped(model, x)
    for training in (False, True):
        model.train(training), converted.train(training)
        reference = copy.deepcopy(model)
        with dropped(reference, plan.changes) as log:
            wanted = reference(x.clone())
        log.assert_all_hit(training=training)
        log.assert_inplace_agrees()
        assert_same(copy.deepcopy(converted)(x.clone()), wanted)
    return converted


@pytest.mark.parametrize("name", SILU)
def test_a_product_with_its_own_sigmoid_is_silu(name):
    model = net(SILU[name])
    assert real(model) == [("block:silu#1", "SiLU"), ("block:silu#2", "SiLU")]
    assert not any(call.inplace for call in calls_of(model, plan_of(model)).values())
    check_dropped(model)


@pytest.mark.parametrize("name", INPLACE)
def test_in_place_on_the_value_is_silu_in_place(name):
    model = net(INPLACE[name])
    plan = plan_of(model)
    calls = calls_of(model, plan)
    found = [(site.id, calls[site.id].inplace) for site in plan.sites if site.is_real]
    assert found == [("block:silu#1", True), ("block:silu#2", True)]
    with torch.no_grad():
        check_dropped(model)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, ways in OTHERS.items() for name in ways])
def test_other_expressions_are_named_by_what_they_compute(kind, name):
    model = net(OTHERS[kind][name])
    assert [site for site, _ in real(model)] == [f"block:{kind}#1", f"block:{kind}#2"]
    if kind != "expression":
        check_dropped(model)
    converted, _ = all_dropped(model)
    block = model.block
    assert_same(converted(X), model.head(block.b(block.n(block.a(model.stem(X))))))


def test_what_is_inside_is_listed_with_a_reason():
    plan = plan_of(net(OTHERS["hardswish"]["six behind"]))
    inner = next(site for site in plan.sites if site.function == "relu6")
    assert inner.action == "skip"
    assert inner.reason == "inside a handwritten activation"


def overwritten(s, x):
    return x.sigmoid_().mul_(x)


def overwritten_between(s, x):
    gate = x.sigmoid()
    x.add_(1)
    return x * gate


def overwritten_through_a_view(s, x):
    seen, gate = x.view(-1), x.sigmoid()
    seen.mul_(2)
    return x * gate


def read_besides(s, x):
    gate = torch.sigmoid(x)
    return x * gate + s.other(gate)


def without_gradient(s, x):
    with torch.no_grad():
        gate = torch.sigmoid(x)
    return x * gate


NONE = {
    "squeeze-excite": lambda s, x: x * s.gate(x),
    "pooled": lambda s, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "spatial": lambda s, x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "another value": lambda s, x: x * torch.sigmoid(s.other(x)),
    "halves": lambda s, x: torch.cat([x[:, :2] * torch.sigmoid(x[:, 2:]), x[:, :2]], 1),
    "a parameter": lambda s, x: x * torch.sigmoid(s.weight * x),
    "sum": lambda s, x: x + torch.sigmoid(x),
    "square": lambda s, x: x * x,
    "scaled": lambda s, x: x * (0.5 * x + 2) / 3,
    "rounded": lambda s, x: x * torch.round(torch.sigmoid(x)),
    "detached": lambda s, x: x * torch.sigmoid(x).detach(),
    "without gradient": without_gradient,
    "dropped out": lambda s, x: x * F.dropout(torch.sigmoid(x), 0.5, s.training),
    "overwritten": overwritten,
    "overwritten between": overwritten_between,
    "overwritten through a view": overwritten_through_a_view,
    "read besides": read_besides,
}


@pytest.mark.parametrize("name", NONE)
def test_anything_else_is_no_activation(name):
    model = Net(NONE[name], gate=gate_module(), other=conv(), weight=nn.Parameter(torch.rand(4, 1, 1)))
    with pytest.raises(nmconv.NoSitesError):
        nmconv.make_plan(model, "2:1", example_inputs=X)


def test_a_gate_that_an_attribute_keeps_is_read_by_whoever_reads_that():
    def work(s, x):
        gate = torch.sigmoid(x)
        if s is not None:
            s.last = gate
        return x * gate

    class Once(Net):
        def forward(self, x):
            return self.head(work(self.block, self.stem(x)))

    with pytest.raises(nmconv.NoSitesError):
        nmconv.make_plan(Once(work), "2:1", example_inputs=X)


def test_a_scale_behind_an_expression_of_no_known_kind_stays():
    model = net(lambda s, x: x * F.relu6(x + 3) / 7)
    assert [site for site, _ in real(model)] == ["block:expression#1", "block:expression#2"]
    converted, _ = all_dropped(model)
    block = model.block
    assert_same(converted(X), model.head(block.b(block.n(block.a(model.stem(X))) / 7) / 7))


def test_the_error_says_which_expressions_are_known():
    with pytest.raises(nmconv.NoSitesError, match="expression in one value"):
        nmconv.make_plan(Net(NONE["overwritten"]), "2:1", example_inputs=X)


def test_calls_and_expressions_of_a_kind_are_counted_together():
    calls = iter(range(100))

    def act(s, x):
        return F.silu(x) if next(calls) % 2 == 0 else x * torch.sigmoid(x)

    class Three(Net):
        def forward(self, x):
            x = F.silu(self.stem(x))
            x = self.head(x)
            x = x * torch.sigmoid(x)
            return F.silu(self.block.a(x))

    model = Three(act)
    assert real(model) == [(f":silu#{at}", "SiLU") for at in (1, 2, 3)]
    check_dropped(model)
    plan = plan_of(model).edit({":silu#1": "keep", ":silu#2": "drop", ":silu#3": "keep"})
    x = F.silu(model.stem(X))
    assert_same(nmconv.apply_plan(model, plan, example_inputs=X)(X), F.silu(model.block.a(model.head(x))))


def test_two_in_a_row_are_two_activations():
    class Two(Net):
        def forward(self, x):
            y = F.relu(self.stem(x))
            y = self.head(y * torch.sigmoid(y))
            y = y * torch.sigmoid(y)
            return y * torch.tanh(F.softplus(y))

    model = Two(None)
    functions = [site.function for site in plan_of(model).sites]
    assert functions == ["relu", "silu", "silu", "softplus", "mish"]

    class Called(Net):
        def forward(self, x):
            return F.mish(F.silu(self.head(F.silu(F.relu(self.stem(x))))))

    called = Called(None)
    called.load_state_dict(model.state_dict())
    assert real(model) == real(called)
    torch.testing.assert_close(all_dropped(model)[0](X), all_dropped(called)[0](X))


def test_an_expression_of_a_network_that_squeeze_excites_leaves_the_gate():
    def act(s, x):
        x = x * torch.sigmoid(x)
        return x * s.gate(x)

    model = net(act)
    assert [name for name, _ in real(model)] == ["block:silu#1", "block:silu#2"]
    check_dropped(model)


class Hsigmoid(nn.Module):
    """As networks on GitHub have it."""

    def __init__(self, inplace=True):
        super().__init__()
        self.relu = nn.ReLU6(inplace=inplace)

    def forward(self, x):
        return self.relu(x + 3) / 6


class Hswish(nn.Module):
    """A product with what a part gives."""

    def __init__(self, inplace=True):
        super().__init__()
        self.sigmoid = Hsigmoid(inplace)

    def forward(self, x):
        return x * self.sigmoid(x)


class Swish(nn.Module):
    """A product with its sigmoid, by a module."""

    def __init__(self):
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(x)


@pytest.mark.parametrize("cls", [Hswish, Swish])
def test_a_module_that_multiplies_with_what_its_part_gives_is_an_activation(cls):
    model = Net(lambda s, x: s.act(x), act=cls()).eval()
    assert real(model) == [("block.act#1", cls.__name__), ("block.act#2", cls.__name__)]
    converted, _ = all_dropped(model)
    block = model.block
    assert_same(converted(X), model.head(block.b(block.n(block.a(model.stem(X))))))
    assert list(converted.state_dict()) == list(model.state_dict())


def test_a_module_whose_part_is_the_activation_is_looked_into():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ReLU()

        def forward(self, x):
            return self.inner(x)

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.sigmoid = nn.Conv2d(4, 4, 1), Hsigmoid()

        def forward(self, x):
            return x * self.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))

    assert {site for site, _ in real(Net(lambda s, x: s.act(x), act=Wrapped()))} == {"block.act.inner#1"}
    with pytest.raises(nmconv.NoSitesError):
        nmconv.make_plan(Net(lambda s, x: s.act(x), act=Gate()), "2:1", example_inputs=X)


def test_an_expression_in_one_mode_only():
    def act(s, x):
        return x * torch.sigmoid(x) if s.training else F.relu(x)

    plan = plan_of(net(act))
    assert {site.id for site in plan.sites if site.is_real} == {
        *("block:relu#1", "block:relu#2"),
        *("block:silu#1(train)", "block:silu#2(train)"),
    }
    check_dropped(net(act))


def test_moved_to_the_end_of_a_unit():
    class Tail(Net):
        def forward(self, x):
            y = self.block.b(swish(self.block.a(swish(self.stem(x)))))
            return self.head(self.block.n(y))

    model = Tail(None).eval()
    plan = nmconv.make_plan(model, "3:1", relocate=True, example_inputs=X, keep="boundary")
    assert [(site.id, site.action) for site in plan.sites] == [(":silu#1", "drop"), (":silu#2", "move")]
    moved = nmconv.apply_plan(model, plan, example_inputs=X)
    y = F.silu(model.block.n(model.block.b(model.block.a(model.stem(X)))))
    assert_same(moved(X), model.head(y))


def test_a_dropped_value_is_copied_where_the_product_was_and_somebody_overwrites_it():
    class Overwriting(Net):
        def forward(self, x):
            first = self.stem(x)
            y = first * torch.sigmoid(first)
            y.add_(1)
            return self.head(y) + first

    model = Overwriting(None)
    converted, _ = all_dropped(model)
    first = model.stem(X)
    assert_same(converted(X), model.head(first + 1) + first)


def test_a_converted_model_keeps_its_class_and_keys_and_can_be_saved(tmp_path):
    model = net(SILU["torch.sigmoid"])
    converted = nmconv.convert(model, "2:1", example_inputs=X)
    assert type(converted) is not Block
    assert isinstance(converted.block, Block)
    assert list(converted.state_dict()) == list(model.state_dict())
    wanted = converted(X)
    assert_same(copy.deepcopy(converted)(X), wanted)
    other = net(SILU["torch.sigmoid"])
    other.load_state_dict(converted.state_dict())
    plan = nmconv.Plan.from_json(nmconv.get_plan(converted).to_json())
    assert_same(nmconv.apply_plan(other, plan, example_inputs=X)(X), wanted)
    nmconv.save(converted, tmp_path / "net.safetensors")
    loaded = nmconv.load(net(SILU["torch.sigmoid"]), tmp_path / "net.safetensors", example_inputs=X)
    assert_same(loaded(X), wanted)
    nmconv.verify(model, converted, example_inputs=X)


def test_the_witness_sees_one_that_was_left():
    model = net(SILU["torch.sigmoid"])
    converted = nmconv.convert(model, "2:1", example_inputs=X)
    converted.block.__class__ = Block
    with pytest.raises(nmconv.WitnessError):
        nmconv.verify(model, converted, example_inputs=X)


def test_double_precision_gradients_and_training():
    model = net(SILU["torch.sigmoid"]).double().train()
    x = X.double()
    converted = check_dropped(model, x)
    converted.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.block.a.parameters())


def test_what_lay_around_a_dropped_one_merges():
    model = net(SILU["torch.sigmoid"])
    converted = nmconv.convert(model, "4:1", example_inputs=X, hoist_padding=True, keep="boundary")
    (run,) = [run for run in nmconv.find_runs(converted, example_inputs=X) if run.convs[0] == "stem"]
    assert run.convs == ("stem", "block.a", "block.b")
    merged = nmconv.merge(converted, gate="always", example_inputs=X)
    torch.testing.assert_close(merged(X), converted(X), atol=1e-5, rtol=1e-4)
    assert [run.convs for run in nmconv.find_runs(model, example_inputs=X)] == [("stem", "block.a")]


class Shaped(nn.Module):
    """A forward that is given its activation: by hand, or as one call."""

    def __init__(self, forward, act):
        super().__init__()
        self.a, self.b, self.c, self.n = conv(), conv(), conv(), nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([conv(), conv()])
        self._forward, self._act = forward, act

    def forward(self, x):
        return self._forward(self, self._act, x)


class Helped(Shaped):
    """A method of the module's own makes the call."""

    def helper(self, x):
        return self._act(x)

    def forward(self, x):
        return self.c(F.relu(self.b(self.helper(self.a(x)))))


class HelpedTwice(Helped):
    """The same, called twice: one decision would change both."""

    def forward(self, x):
        return self.c(self.helper(self.b(self.helper(self.a(x)))))


def in_a_loop(s, act, x):
    for block in s.blocks:
        x = act(block(x))
    return s.c(x)


def residual(s, act, x):
    x = act(s.a(x))
    return s.c(act(x + s.b(x)))


def preactivated(s, act, x):
    x = s.a(x)
    return x + s.c(act(s.n(s.b(act(s.n(x))))))


def branching(s, act, x):
    x = act(s.a(x)) if x.shape[0] > 1 else s.a(x)
    return s.c(act(s.b(x)))


def in_a_context(s, act, x):
    with torch.autocast("cpu", enabled=False):
        x = act(s.a(x))
    return s.c(act(s.b(x)))


def squeeze_excite(s, act, x):
    x = act(s.a(x))
    x = x * torch.sigmoid(s.b(act(s.blocks[0](x.mean((2, 3), keepdim=True)))))
    return s.c(act(x))


def two_outputs(s, act, x):
    x = act(s.a(x))
    return x, act(s.b(x))


def twice(s, act, x):
    y = s.a(x)
    return s.c(act(y + 0) + s.b(act(y + 0)))


def overwritten_later(s, act, x):
    y = s.a(x)
    z = act(y)
    z += 1
    return s.c(z) + s.b(y)


FORWARDS = {
    "parallel": lambda s, act, x: s.c(act(s.a(x) + s.b(x))),
    **{
        forward.__name__: forward
        for forward in (in_a_loop, residual, preactivated, branching, in_a_context, squeeze_excite, two_outputs, twice)
    },
    "overwritten later": overwritten_later,
}
PAIRS = {
    "out of place": (swish, F.silu),
    "in-place": (lambda x: x.mul_(torch.sigmoid(x)), partial(F.silu, inplace=True)),
}


def made_of(call):
    return call.copy, call.inplace, call.how


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", [*FORWARDS, "Helped", "HelpedTwice"])
def test_by_hand_is_planned_as_by_a_call(name, pair):
    """The same sites, reasons, copies and refusals, and the same outputs whatever goes."""
    found = []
    for act in PAIRS[pair]:
        torch.manual_seed(0)
        cls = {"Helped": Helped, "HelpedTwice": HelpedTwice}.get(name, Shaped)
        model = cls(FORWARDS.get(name), act).eval()
        for relocate in (False, True):
            plan = nmconv.make_plan(model, "2:1", relocate=relocate, example_inputs=X)
            rest = plan.edit({site.id: "drop" for site in plan.sites if site.is_real and not site.locked})
            told = [(site.id, site.kind, site.convs, site.role, site.action, site.reason) for site in plan.sites]
            calls = calls_of(model, plan, X)
            told += [(site.locked != "", *made_of(calls[site.id])) for site in plan.sites]
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", nmconv.NoEffectWarning)
                outputs = [nmconv.apply_plan(model, each, example_inputs=X)(X.clone()) for each in (plan, rest)]
            found.append((told, outputs))
    for by_hand, by_call in zip(found[:2], found[2:], strict=True):
        assert by_hand[0] == by_call[0]
        torch.testing.assert_close(by_hand[1], by_call[1])


class Classifier(nn.Module):
    """A network with a head, to fit and to search."""

    def __init__(self, work):
        super().__init__()
        self.net, self.fc = net(work), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.net(x).mean((2, 3)))


@pytest.mark.parametrize("work", [SILU["torch.sigmoid"], INPLACE["mul_"], OTHERS["hardswish"]["six behind"]])
def test_fitting_and_searching_know_them_as_they_know_calls(work):
    images = torch.rand(16, 4, 10, 10)
    model, called = Classifier(work).eval(), Classifier(lambda s, x: F.silu(x)).eval()
    converted = nmconv.convert(model, "2:1", example_inputs=images, keep="boundary")
    fitted = nmconv.get_fit(nmconv.fit(converted, images, reference=model))
    assert [unit.convs for unit in fitted.units if not unit.why] == [("net.block.a", "net.block.b")]
    by_hand, by_call = (
        [candidate.convs for candidate in nmconv.sensitivity(each, images, quiet=True).candidates]
        for each in (model, called)
    )
    assert by_hand == by_call
    assert ("net.stem", "net.block.a", "net.block.b") in by_hand


def test_a_residual_branch_with_one_in_it_can_go():
    class Residual(Net):
        def forward(self, x):
            x = self.stem(x)
            y = self.block.a(x)
            return self.head(x + self.block.b(y * torch.sigmoid(y)))

    found = nmconv.sensitivity(Residual(None).eval(), torch.rand(8, 4, 8, 8), quiet=True, max_convs=2)
    assert any(candidate.size == "none" for candidate in found.candidates)


def test_a_shared_block_and_another_thread():
    class Twice(Net):
        def forward(self, x):
            return self.head(self.block(self.block(self.stem(x))))

    model = Twice(SILU["torch.sigmoid"]).eval()
    found = []
    thread = threading.Thread(target=lambda: found.append(real(model)))
    thread.start(), thread.join()
    assert found == [real(model)]
    check_dropped(model)


def test_an_expression_given_another_way_by_its_input_is_refused_or_right():
    """A number that a size makes is not known when a method is written anew: the site stays, or the result is right."""

    def act(s, x):
        return x * torch.sigmoid(x * (x.shape[1] / 4))

    plan = plan_of(net(act))
    assert all(site.locked for site in plan.sites if site.is_real)


def test_autocast_and_half_run_after_the_change():
    model = net(SILU["nn.Sigmoid"])
    converted, _ = all_dropped(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert converted(X).dtype is torch.bfloat16
    assert converted.bfloat16()(X.bfloat16()).dtype is torch.bfloat16


def test_the_oracle_counts_expressions_by_what_they_give():
    for way in (*SILU, *INPLACE):
        model = net({**SILU, **INPLACE}[way])
        with torch.no_grad(), record(model) as entries:
            model(X.clone())
        assert [(entry.owner, entry.kind, entry.call) for entry in entries] == [
            ("block", "silu", 1),
            ("block", "silu", 2),
        ]
        assert {entry.inplace for entry in entries} == {way in INPLACE}
