"""The oracle against hand-written expectations: it judges the library, so nothing of the library is used here."""

import copy
import dataclasses
import math
import subprocess
import sys
import types
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oracle import Entry, assert_same, dropped, is_activation, record

torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class Site:
    name: str
    function: str | None = None
    owner: str = ""
    call: int = 1
    train_call: int | None = 1
    modes: str = "both"
    inplace: bool = False


def site(name="relu", function=None, owner="", call=1, inplace=False, **other) -> Site:
    return Site(name, function, owner, call, **{"train_call": call, "inplace": inplace, **other})


class Net(nn.Module):
    """A module around a forward function; the keywords become attributes, children among them."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.run = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def signed(*shape: int) -> torch.Tensor:
    """Numbers of both signs, no two alike."""
    x = torch.linspace(-2, 2.3, math.prod(shape or (8,)))
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].reshape(shape or (8,))


def run(model: nn.Module, sites: list[Site], *args, hits: list[int] | None = None, **kwargs):
    """The output under ``dropped``; every site must be hit as often as said (default: once)."""
    with dropped(model, sites) as log:
        out = model(*args, **kwargs)
    assert log.hits == (hits or [1] * len(sites))
    log.assert_inplace_agrees()
    return out


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [(), (1,), (2,), (3,), (1, 3), (1, 2, 3)])
def test_each_call_of_a_shared_module_is_its_own_site(which):
    net = Net(lambda self, x: self.relu(self.relu(self.relu(x - 1) - 0.5).neg() + 0.2), relu=nn.ReLU())
    act = [(lambda x: x) if n in which else torch.relu for n in (1, 2, 3)]
    x = signed()
    want = act[2](act[1](act[0](x - 1) - 0.5).neg() + 0.2)
    assert_same(run(net, [site(call=n) for n in which], x), want)
    assert_same(net(x), net.relu(net.relu(net.relu(x - 1) - 0.5).neg() + 0.2))


def test_one_module_called_from_two_owners_is_counted_for_each():
    relu = nn.ReLU()
    left = Net(lambda self, x: self.act(self.act(x) - 1), act=relu)
    right = Net(lambda self, x: self.relu(x + 1), relu=relu)
    net = Net(lambda self, x: self.left(x) + self.right(x) * 10 + self.top(x) * 100, left=left, right=right, top=relu)
    x = signed()
    assert_same(run(net, [site("left.act", owner="left")], x), (x - 1).relu() + (x + 1).relu() * 10 + x.relu() * 100)
    # any of its names will do: the object counts
    assert_same(run(net, [site("top", owner="right")], x), (x.relu() - 1).relu() + (x + 1) * 10 + x.relu() * 100)
    both = [site("left.act", owner=""), site("right.relu", owner="left", call=2)]
    assert_same(run(net, both, x), (x.relu() - 1) + (x + 1).relu() * 10 + x * 100)
    with dropped(net, [site("top", owner="right", call=2)]) as log:
        assert_same(net(x), (x.relu() - 1).relu() + (x + 1).relu() * 10 + x.relu() * 100)
    assert log.hits == [0]


def test_numbers_restart_with_each_forward_call_of_the_owner():
    head = Net(lambda self, x: self.relu(self.relu(x) - 1), relu=nn.ReLU())
    net = Net(lambda self, x: [self.head(x + n) for n in range(3)], head=head)
    x = signed()
    out = run(net, [site("head.relu", owner="head", call=2)], x, hits=[3])
    assert_same(out, [torch.relu(x + n) - 1 for n in range(3)])
    assert_same(
        run(net, [site("head.relu", owner="head", call=1)], x, hits=[3]), [(x + n - 1).relu() for n in range(3)]
    )


def test_an_owner_that_calls_itself_has_a_frame_for_each_activation():
    def forward(self, x, depth=2):
        x = self.relu(x)
        if depth:
            x = self(x - 1, depth - 1)
        return self.relu(x - 0.25)

    net = Net(forward, relu=nn.ReLU())
    x = signed()
    # only the second calls go: the unwinding inner ones must not have moved the outer counts
    want = ((x.relu() - 1).relu() - 1).relu() - 0.75
    assert_same(run(net, [site(call=2)], x, hits=[3]), want)


def test_the_caller_is_the_innermost_module_not_the_registering_one():
    net = Net(lambda self, x: self.inner(x, self.relu), relu=nn.ReLU(), inner=Net(lambda self, x, act: act(x)))
    x = signed()
    with dropped(net, [site()]) as log:
        assert_same(net(x), x.relu())
    assert log.hits == [0]
    assert_same(run(net, [site(owner="inner")], x), x)


def test_sequential_is_an_owner_too():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    x = signed(2, 4)
    assert_same(run(net, [site("2.1", owner="2")], x), net[2][0](net[0](x).relu()))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_dropped_module_call_does_not_run_and_aliases_only_where_the_original_does(inplace):
    def forward(self, x):
        x = x + 0
        y = self.relu(x)
        y.add_(5)
        return x, y, y is x

    net = Net(forward, relu=nn.ReLU(inplace=inplace))
    x = signed()
    after, out, alias = run(net, [site(inplace=inplace)], x)
    assert alias is inplace
    assert_same(out, x + 5)
    assert_same(after, x + 5 if inplace else x)  # never relu(x)
    after, out, alias = net(x)
    assert_same(after, x.relu() + 5 if inplace else x)


def test_a_later_reader_of_an_inplace_input_sees_it_unactivated():
    net = Net(lambda self, x: self.relu(x) * 2 + x, relu=nn.ReLU(inplace=True))
    x = signed()
    assert_same(net(x.clone()), x.relu() * 3)
    assert_same(run(net, [site(inplace=True)], x.clone()), x * 3)


def test_the_modules_own_flag_rules_and_a_wrong_claim_is_reported():
    net = Net(lambda self, x: self.relu(x), relu=nn.ReLU(inplace=True))
    x = signed()
    with dropped(net, [site(inplace=False)]) as log:
        assert net(x) is x
    log.assert_all_hit(training=True)
    with pytest.raises(AssertionError, match=r"relu#1 .*inplace=False.*inplace=True"):
        log.assert_inplace_agrees()
    net.relu.inplace = False
    with dropped(net, [site(inplace=True)]) as log:
        assert net(x) is not x
    with pytest.raises(AssertionError, match="inplace=False"):
        log.assert_inplace_agrees()


def test_input_by_keyword_and_hooks_of_a_dropped_module():
    net = Net(lambda self, x: self.relu(input=x), relu=nn.ReLU())
    ran = []
    net.relu.register_forward_hook(lambda *_: ran.append(1))
    x = signed()
    assert_same(run(net, [site()], x), x)
    assert not ran
    net(x)
    assert ran


def test_hooks_of_other_modules_still_run():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net[0].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    net[0].register_forward_hook(lambda _, args, out: out + 1)
    x = signed(2, 4)
    assert_same(run(net, [site("1")], x), F.linear(x * 2, net[0].weight, net[0].bias) + 1)


def test_dropping_works_on_classes_of_any_kind():
    net = Net(lambda self, x: self.pool(self.act(x)), pool=nn.MaxPool1d(2), act=nn.Sigmoid())
    x = signed(2, 4)
    assert_same(run(net, [site("act")], x), F.max_pool1d(x, 2))


# --- functions --------------------------------------------------------------------------------------------------------

W = torch.tensor([0.3])
CALLS = [
    ("relu", False, lambda x: F.relu(x)),
    ("relu", False, lambda x: F.relu(x, False)),
    ("relu", False, lambda x: F.relu(input=x)),
    ("relu", False, lambda x: torch.relu(x)),
    ("relu", False, lambda x: torch.relu(input=x)),
    ("relu", False, lambda x: x.relu()),
    ("relu", False, lambda x: torch.Tensor.relu(x)),
    ("relu", True, lambda x: F.relu(x, True)),
    ("relu", True, lambda x: F.relu(x, inplace=True)),
    ("relu", True, lambda x: F.relu_(x)),
    ("relu", True, lambda x: torch.relu_(x)),
    ("relu", True, lambda x: x.relu_()),
    ("relu6", False, lambda x: F.relu6(x)),
    ("relu6", True, lambda x: F.relu6(x, True)),
    ("relu6", False, lambda x: torch._C._nn.relu6(x)),
    ("leaky_relu", False, lambda x: F.leaky_relu(x, 0.2)),
    ("leaky_relu", True, lambda x: F.leaky_relu(x, 0.2, True)),
    ("leaky_relu", True, lambda x: F.leaky_relu_(x, 0.2)),
    ("prelu", False, lambda x: F.prelu(x, W)),
    ("prelu", False, lambda x: F.prelu(weight=W, input=x)),
    ("prelu", False, lambda x: torch.prelu(x, W)),
    ("prelu", False, lambda x: x.prelu(W)),
    ("elu", False, lambda x: F.elu(x, 0.7)),
    ("elu", True, lambda x: F.elu(x, 0.7, True)),
    ("elu", True, lambda x: F.elu_(x)),
    ("selu", False, lambda x: F.selu(x)),
    ("selu", True, lambda x: F.selu(x, True)),
    ("selu", True, lambda x: F.selu_(x)),
    ("selu", False, lambda x: torch.selu(x)),
    ("selu", True, lambda x: torch.selu_(x)),
    ("celu", False, lambda x: F.celu(x, 1.5)),
    ("celu", True, lambda x: F.celu(x, 1.5, True)),
    ("celu", False, lambda x: torch.celu(x)),
    ("celu", True, lambda x: torch.celu_(x)),
    ("gelu", False, lambda x: F.gelu(x)),
    ("gelu", False, lambda x: F.gelu(x, approximate="tanh")),
    ("silu", False, lambda x: F.silu(x)),
    ("silu", True, lambda x: F.silu(x, True)),
    ("silu", True, lambda x: torch._C._nn.silu_(x)),
    ("hardswish", False, lambda x: F.hardswish(x)),
    ("hardswish", True, lambda x: F.hardswish(x, True)),
    ("mish", False, lambda x: F.mish(x)),
    ("mish", True, lambda x: F.mish(x, True)),
    ("softplus", False, lambda x: F.softplus(x)),
    ("softplus", False, lambda x: torch._C._nn.softplus(x)),
]


class Odd(torch.Tensor):
    """A tensor class with the default ``__torch_function__``: its calls are dispatched twice."""


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("n", range(len(CALLS)))
def test_every_way_of_calling_a_function_counts_once(n, odd):
    kind, inplace, function = CALLS[n]

    def forward(self, x):
        x = x + 0
        y = function(x)
        return x, y, y is x

    net = Net(forward)
    x = signed().as_subclass(Odd) if odd else signed()
    with record(net) as entries:
        before, out, alias = net(x)
    assert entries == [Entry("", None, kind, 1, inplace)]
    assert alias is inplace and not torch.equal(out, x)
    before, out, alias = run(net, [site("", kind, inplace=inplace)], x)
    assert alias is inplace
    assert_same(out, x)
    assert_same(before, x)
    with dropped(net, [site("", kind, call=2, inplace=inplace)]) as log:
        assert_same(net(x)[1], function(x.clone()))
    assert log.hits == [0]


def test_kinds_are_counted_apart_and_all_spellings_of_one_together():
    def forward(self, x):
        a = F.relu(x)
        b = F.silu(x)
        c = torch.relu_(x * 2)
        d = (x * 3).relu()
        return a, b, c, d, F.silu(x * 4, inplace=True)

    net = Net(forward)
    x = signed()
    a, b, c, d, e = net(x)
    sites = [site("", "relu", call=2, inplace=True), site("", "silu", call=2, inplace=True)]
    assert_same(run(net, sites, x), (a, b, x * 2, d, x * 4))
    assert_same(run(net, [site("", "relu", call=3), site("", "silu")], x), (a, x, c, x * 3, e))


def test_a_function_in_nested_functions_belongs_to_the_running_module():
    def deep(x):
        return (lambda y: list(map(F.relu, [y, -y])))(x)

    net = Net(lambda self, x: (deep(x), self.block(x)), block=Net(lambda self, x: deep(x) + deep(x)))
    x = signed()
    r, m = x.relu(), (-x).relu()
    assert_same(run(net, [site("block", "relu", owner="block", call=3)], x), ([r, m], [r, m, x, m]))
    assert_same(run(net, [site("", "relu", call=2)], x), ([r, -x], [r, m, r, m]))


def test_a_function_inside_an_activation_module_is_that_modules_own():
    net = Net(lambda self, x: F.relu(self.relu(x) - 1), relu=nn.ReLU())
    x = signed()
    assert_same(run(net, [site("", "relu")], x), x.relu() - 1)
    assert_same(run(net, [site("relu")], x), (x - 1).relu())
    with dropped(net, [site("", "relu", call=2)]) as log:
        assert_same(net(x), (x.relu() - 1).relu())
    assert log.hits == [0]


def test_forward_called_by_hand_opens_no_frame():
    net = Net(lambda self, x: self.block.forward(x) + self.relu.forward(x), relu=nn.ReLU())
    net.block = nn.Sequential(nn.ReLU())
    x = signed()
    assert_same(run(net, [site("block.0", owner="")], x), x + x.relu())
    assert_same(run(net, [site("", "relu")], x), x.relu() + x)


# --- modes, autograd, devices -----------------------------------------------------------------------------------------


def test_the_owners_own_mode_chooses_the_number():
    def forward(self, x):
        if self.training:
            x = self.relu(x + 0.1)
        return self.relu(x - 1)

    net = nn.Sequential(Net(forward, relu=nn.ReLU()))
    sites = [site("0.relu", owner="0", call=1, train_call=2)]
    x = signed()
    assert_same(run(net, sites, x), (x + 0.1).relu() - 1)
    net[0].eval()  # frozen, while the root still trains
    assert_same(run(net, sites, x), x - 1)


def test_sites_of_one_mode_count_only_there():
    def forward(self, x):
        return self.relu(x + 0.1) if self.training else self.relu(x - 0.1) * 2

    net = Net(forward, relu=nn.ReLU())
    x = signed()
    only_train, only_eval = site(modes="train"), site(modes="eval", train_call=None)
    with dropped(net, [only_train, only_eval]) as log:  # the same call number, but never the same call
        assert_same(net(x), x + 0.1)
    assert (log.count(only_train), log.count(only_eval)) == (1, 0)
    log.assert_all_hit(training=True)
    with pytest.raises(AssertionError, match=r"1 site\(s\) never hit: relu#1 .*eval"):
        log.assert_all_hit(training=False)
    net.eval()
    with dropped(net, [only_train]) as log:
        assert_same(net(x), (x - 0.1).relu() * 2)
    log.assert_all_hit(training=False)
    net.train()
    with dropped(net, [site(modes="eval", train_call=1)]) as log:  # modes rules, whatever number there is
        assert_same(net(x), (x + 0.1).relu())
    assert log.hits == [0]


def test_a_site_never_hit_is_named():
    net = Net(lambda self, x: self.relu(x), relu=nn.ReLU())
    with dropped(net, [site(), site(call=2), site("", "relu")]) as log:
        net(signed())
    for training in (True, False):
        with pytest.raises(AssertionError, match=r"2 site\(s\) never hit: relu#2 .*, :relu#1"):
            log.assert_all_hit(training=training)


def test_sites_that_mean_the_same_call_are_refused():
    relu = nn.ReLU()
    net = Net(lambda self, x: self.a(x), a=relu, b=relu)
    with pytest.raises(ValueError, match=r"the same call: a#1 .* and b#1"), dropped(net, [site("a"), site("b")]):
        pass
    with pytest.raises(AttributeError), dropped(net, [site("nowhere")]):
        pass
    assert_untouched()


def test_gradients_are_those_of_the_hand_written_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(True), nn.Conv2d(3, 2, 3), nn.ReLU(True))
    twin = copy.deepcopy(net)
    x = signed(2, 2, 8, 8)
    out = run(net, [site("2", inplace=True)], x)
    want = F.relu(twin[3](twin[1](twin[0](x))))
    assert_same(out, want)
    out.square().sum().backward()
    want.square().sum().backward()
    assert_same([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])
    assert_same(net.state_dict(), twin.state_dict())


def test_meta_tensors_and_inference_mode():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(True), Net(lambda self, x: F.gelu(x)))
    sites = [site("1", inplace=True), site("2", "gelu", owner="2")]
    with torch.inference_mode():
        x = signed(1, 2, 5, 5)
        assert_same(run(net, sites, x), net[0](x))
    net.to("meta")
    out = run(net, sites, torch.empty(1, 2, 5, 5, device="meta"))
    assert out.is_meta and out.shape == (1, 3, 3, 3)


# --- nothing stays behind ---------------------------------------------------------------------------------------------

CALL = nn.Module.__call__


def assert_untouched():
    assert nn.Module.__call__ is CALL
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_unwinds_everything(error):
    def forward(self, x, fail=False):
        x = self.relu(x)
        if fail:
            raise error("on purpose")
        return x

    inner = Net(forward, relu=nn.ReLU())
    net = Net(lambda self, x: self.inner(self.relu(x - 1)), inner=inner, relu=inner.relu)
    x = signed()
    with dropped(net, [site("inner.relu", owner="inner"), site("relu")]) as log:
        with pytest.raises(error, match="on purpose"):
            inner(x, fail=True)
        assert_same(net(x), x - 1)  # the frame that failed is gone: the root is the owner again
        assert log.hits == [2, 1]
    assert_untouched()
    with pytest.raises(error, match="on purpose"), dropped(net, [site()]), record(net):
        inner(x, fail=True)
    assert_untouched()


def test_a_module_may_fail_and_be_caught_inside_the_forward():
    def forward(self, x):
        try:
            self.bad(x)
        except ZeroDivisionError:
            return self.relu(x)

    net = Net(forward, bad=Net(lambda self, x: 1 / 0), relu=nn.ReLU())
    x = signed()
    assert_same(run(net, [site()], x), x)


def test_the_model_is_left_as_found():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(True), nn.Sequential(nn.PReLU()))
    before = [(name, type(m), {k: repr(v) for k, v in vars(m).items()}) for name, m in net.named_modules()]
    with dropped(net, [site("1", inplace=True), site("2.0", owner="2")]), record(net):
        net(signed(1, 2, 5, 5))
        during = [(name, type(m), {k: repr(v) for k, v in vars(m).items()}) for name, m in net.named_modules()]
    after = [(name, type(m), {k: repr(v) for k, v in vars(m).items()}) for name, m in net.named_modules()]
    assert before == during == after
    assert_untouched()


def test_the_oracle_is_independent():
    code = "import sys, oracle; print(*sorted(set(sys.modules) & {'nmconv', 'timm', 'torchvision'}))"
    here = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    source = (here / "oracle" / "recorder.py").read_text()
    assert not [line for line in source.splitlines() if "import" in line and ("fx" in line or "nmconv" in line)]


# --- record -----------------------------------------------------------------------------------------------------------


def test_record_numbers_as_dropped_does_and_changes_nothing():
    shared = nn.ReLU(inplace=True)
    block = Net(lambda self, x: self.act(F.silu(self.act(x))), act=shared)
    net = Net(lambda self, x: self.act(self.block(self.block(x))).relu_() + F.relu(x), act=shared, block=block)
    x = signed()
    want = net(x.clone())
    with record(net) as entries:
        assert_same(net(x.clone()), want)
    one = [
        Entry("block", "act", "ReLU", 1, True),
        Entry("block", None, "silu", 1, False),
        Entry("block", "act", "ReLU", 2, True),
    ]
    top = [
        Entry("", "act", "ReLU", 1, True),
        Entry("", None, "relu", 1, True),
        Entry("", None, "relu", 2, False),
    ]
    assert entries == one + one + top


@pytest.mark.parametrize("record_outside", [True, False])
def test_record_nests_with_dropped(record_outside):
    net = Net(lambda self, x: F.relu(self.relu(x) - 1) + F.relu(x), relu=nn.ReLU())
    x = signed()
    sites = [site(), site("", "relu", call=2)]
    if record_outside:
        with record(net) as entries, dropped(net, sites) as log:
            out = net(x)
    else:
        with dropped(net, sites) as log, record(net) as entries:
            out = net(x)
    assert_same(out, (x - 1).relu() + x)
    assert log.hits == [1, 1]
    # the one opened last is asked first: a function dropped by it never reaches the one outside
    kinds = [(entry.kind, entry.call) for entry in entries]
    assert kinds == ([("relu", 1)] if record_outside else [("ReLU", 1), ("relu", 1), ("relu", 2)])
    assert_untouched()


def test_record_sees_only_the_given_model():
    a, b = nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU())
    wrapped = Net(lambda self, x: self.a(x) + F.relu(x), a=a)
    x = signed()
    with record(a) as of_a, record(b) as of_b:
        a(x), b(x), F.relu(x), wrapped(x)
    assert of_a == [Entry("", "0", "ReLU", 1, False)] * 2
    assert of_b == [Entry("", "0", "GELU", 1, False)]


@pytest.mark.parametrize("size", [0.0, 1e-8])
def test_numbers_that_fit_an_activation_do_not_make_one(size):
    net = Net(lambda self, x: (x * 0.5).mul_(2) + (x * torch.sigmoid(x)) + ((x + 3) * x))
    with record(net) as entries:
        net(size * signed())
    assert [entry.kind for entry in entries] == ["silu"]


def test_record_names_what_is_not_registered():
    net = Net(lambda self, x: nn.ReLU()(self.hidden[0](x)), hidden=[nn.Sequential(nn.GELU())])
    with record(net) as entries:
        net(signed())
    assert entries == [
        Entry("<unregistered Sequential>", "<unregistered GELU>", "GELU", 1, False),
        Entry("", "<unregistered ReLU>", "ReLU", 1, False),
    ]


def test_record_counts_no_identity_however_it_is_made():
    class Silent(nn.ReLU):
        def forward(self, input):
            return input

    class Doubled(nn.ReLU):
        def forward(self, input):
            return super().forward(input) * 2

    class Plain(nn.ReLU):
        pass

    muted = nn.SiLU()
    muted.forward = lambda x: x
    assert [is_activation(m) for m in (Silent(), muted, Doubled(), Plain(), nn.Identity())] == [False] * 3 + [
        True,
        False,
    ]
    net = nn.Sequential(Silent(), muted, Doubled(), Plain(), nn.Identity())
    with record(net) as entries:
        net(signed())
    assert entries == [Entry("2", None, "relu", 1, False), Entry("", "3", "Plain", 1, False)]


def test_record_with_a_predicate_of_ones_own():
    star = Net(lambda self, x: self.relu(x) ** 2 + F.relu(x), relu=nn.ReLU())
    net = nn.Sequential(star, nn.ReLU(), nn.Sigmoid())
    with record(net, lambda m: m is star or isinstance(m, nn.Sigmoid)) as entries:
        net(signed())
    # the star's insides are its own business; a ReLU no longer an activation module shows its function
    assert [(e.owner, e.name, e.kind) for e in entries] == [
        ("", "0", "Net"), ("1", None, "relu"), ("", "2", "Sigmoid")
    ]  # fmt: skip


def test_is_activation_knows_the_classes_of_torch_and_timm():
    layers = pytest.importorskip("timm.layers")
    known = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(), nn.SiLU()]
    known += [nn.Hardswish(), nn.Mish(), nn.Softplus()]
    names = "Swish Mish HardSwish HardMish PReLU GELU GELUTanh QuickGELU SwishMe MishMe HardSwishMe HardMishMe"
    known += [getattr(layers, name, None) or getattr(layers.create_act, name) for name in names.split()]
    known = [m if isinstance(m, nn.Module) else m() for m in known]
    assert [m for m in known if not is_activation(m)] == []
    gates = [nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Softmax(0), nn.Hardtanh(), nn.Identity(), nn.Conv2d(1, 1, 1)]
    gates += [layers.Sigmoid(), layers.Tanh(), layers.HardSigmoid(), layers.create_act.HardSigmoidMe()]
    assert [m for m in gates if is_activation(m)] == []
    net = nn.Sequential(*known)
    with record(net) as entries:
        net(signed(2, 4))
    assert [e.name for e in entries] == [str(n) for n in range(len(known))]


# --- real models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_resnet18_against_a_hand_edited_forward(training):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net = models.resnet18(weights=None, num_classes=5).train(training)
    twin = copy.deepcopy(net)

    def forward(self, x):  # BasicBlock.forward without its first ReLU
        return self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)

    twin.layer1[0].forward = types.MethodType(forward, twin.layer1[0])
    x = signed(2, 3, 40, 40)
    first, second = (site("layer1.0.relu", owner="layer1.0", call=n, inplace=True) for n in (1, 2))
    out = run(net, [first], x)
    assert_same(out, twin(x))
    assert_same(net.state_dict(), twin.state_dict())
    assert not torch.equal(out, net(x)) and not torch.equal(out, run(net, [second], x))
    with record(net) as entries:
        net(x)
    assert len(entries) == 17 and all(e.inplace for e in entries)
    with record(twin) as fewer:
        twin(x)
    assert list((Counter(entries) - Counter(fewer)).elements()) == [Entry("layer1.0", "layer1.0.relu", "ReLU", 2, True)]


def test_googlenet_functions_in_both_modes():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net = models.googlenet(weights=None, num_classes=5, aux_logits=True, init_weights=False)
    twin = copy.deepcopy(net)

    def conv(self, x):
        return self.bn(self.conv(x))

    def aux(self, x):
        x = torch.flatten(self.conv(F.adaptive_avg_pool2d(x, (4, 4))), 1)
        return self.fc2(self.dropout(self.fc1(x)))

    twin.inception3a.branch2[0].forward = types.MethodType(conv, twin.inception3a.branch2[0])
    twin.aux1.forward = types.MethodType(aux, twin.aux1)
    block = "inception3a.branch2.0"
    sites = [
        site(block, "relu", owner=block, inplace=True),
        site("aux1", "relu", owner="aux1", inplace=True, modes="train"),
    ]
    x = signed(2, 3, 64, 64)
    torch.manual_seed(1)
    with dropped(net, sites) as log:
        out = net(x)
    log.assert_all_hit(training=True)
    log.assert_inplace_agrees()
    torch.manual_seed(1)
    assert type(out).__name__ == "GoogLeNetOutputs"
    assert_same(out, twin(x))
    assert_same(net.eval().state_dict(), twin.eval().state_dict())
    with dropped(net, sites) as log:
        assert_same(net(x), twin(x))
    log.assert_all_hit(training=False)
    assert log.hits == [1, 0]
    with record(net) as entries:
        net(x)
    assert {e.kind for e in entries} == {"relu"} and len(entries) == 57


# --- assert_same ------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Data:
    t: torch.Tensor
    n: int = 0


class Bag:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def nested(value: float = 1.0):
    t = torch.tensor([0.0, value, math.nan])
    return {"a": [t, (t, None)], "b": Pair(Data(t, 3), Bag(boxes=t, sizes=[(1, 2)])), "c": math.nan, "d": "word"}


def test_equal_outputs_pass():
    assert_same(nested(), nested())
    assert_same((), ())
    assert_same(torch.zeros(0, 3), torch.zeros(0, 3))
    assert_same(torch.empty(2, device="meta"), torch.empty(2, device="meta"))
    x = signed(2, 3)
    assert_same(x.t().contiguous().t(), x)  # strides are not compared
    assert_same(nn.Parameter(x), x)


T = torch.tensor
DIFFERENT = [
    (nested(), nested(1.0000001), r"output\['a'\]\[0\]: 1 of 3 elements differ"),
    (T([1.0, math.nan]), T([math.nan, 1.0]), "output: 2 of 2"),
    (T([math.nan, math.nan]), T([math.nan, 0.0]), "output: 1 of 2"),
    (T([1.0]), T([1.0], dtype=torch.float64), r"dtype torch.float32 != torch.float64"),
    (T([1.0]), T([[1.0]]), "shape"),
    (T([1.0]), torch.empty(1, device="meta"), "device"),
    (torch.empty(2, device="meta"), torch.empty(3, device="meta"), "shape"),
    (T(1.0), 1.0, "Tensor != float"),
    (T(1.0), None, "Tensor != NoneType"),
    ([1, 2], (1, 2), "list != tuple"),
    (Pair(1, 2), (1, 2), "Pair != tuple"),
    ([1, 2], [1], "length 2 != 1"),
    (Pair(T(1.0), T(2.0)), Pair(T(1.0), T(3.0)), r"output\[1\]: 1 of 1"),
    ({"a": 1}, {"b": 1}, "keys"),
    ({"a": 1, "b": 1}, {"a": 1}, "keys"),
    ({"a": 1}, OrderedDict(a=1), "dict != OrderedDict"),
    ({"a": 1, 2: [T(1)]}, {"a": 1, 2: [T(2)]}, r"output\[2\]\[0\]"),
    (Data(T([1.0])), Data(T([2.0])), r"output\.t: 1 of 1"),
    (Data(T([1.0])), Data(T([1.0]), 1), r"output\.n: 0 != 1"),
    (Bag(a=T([1])), Bag(a=T([2])), r"output\.a"),
    (Bag(a=1), Bag(b=1), "attributes"),
    (F.relu, F.silu, "output: <function relu"),
    (1, True, "int != bool"),
    (math.nan, 1.0, "nan != 1.0"),
]


@pytest.mark.parametrize("n", range(len(DIFFERENT)))
def test_the_first_difference_is_named(n):
    a, b, message = DIFFERENT[n]
    with pytest.raises(AssertionError, match=message):
        assert_same(a, b)
    with pytest.raises(AssertionError):
        assert_same(b, a)
