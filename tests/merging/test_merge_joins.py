"""Sums folded into kernels: residual identities, parallel convolutions, both, nested; and sums that are none of these.

What ran is counted, too: a join that folds leaves one convolution and no sum of two maps behind.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_nets import CONV, NORM, C, assert_agree, assert_near, conv, counts, made, merge, picture, settle
from nets import net
from torch import nn

import nmconv

torch.set_num_threads(1)
SHAPES = [(C, size, width) for size in range(1, 12) for width in (size, 12 - size)]


def normed(kernel=3, **options):
    return nn.Sequential(conv(kernel, bias=False, **options), nn.BatchNorm2d(options.get("outputs", C)))


def folds(model, *, convs=1, sums=0, norms=0, shapes=SHAPES, shape=(C, 9, 10)):
    """It merges to the same, and what runs afterwards is as many convolutions, sums and norms as are said."""
    merged = merge(model)
    assert assert_agree(merged, model, *shapes)
    ran = counts(merged, picture(*shape))
    assert (ran.convs, ran.sums, ran.norms) == (convs, sums, norms)
    return merged


# Identities ----------------------------------------------------------------------------------------------------------


def assigned(self, x):
    y = self.a(x)
    y += x
    return y


IDENTITIES = {
    "a(x) + x": lambda self, x: self.a(x) + x,
    "x + a(x)": lambda self, x: x + self.a(x),
    "torch.add": lambda self, x: torch.add(self.a(x), x),
    "y += x": assigned,
}
BRANCHES = {
    "3x3": conv,
    "1x1": lambda: conv(1),
    "5x5 and norm": lambda: normed(5),
    "depthwise": lambda: conv(3, groups=C),
    "grouped": lambda: conv(3, groups=2),
    "dilated": lambda: conv(3, dilation=2, padding=2),
    "by axis": lambda: nn.Conv2d(C, C, (3, 1), padding=(1, 0)),
    "same": lambda: nn.Conv2d(C, C, (3, 5), padding="same"),
    "a run": lambda: nn.Sequential(conv(1, outputs=9), nn.BatchNorm2d(9), nn.Dropout(0.2), conv(3, inputs=9)),
    "a run that ends in 1x1": lambda: nn.Sequential(conv(3, outputs=9), nn.BatchNorm2d(9), conv(1, inputs=9)),
    "norm first": lambda: nn.Sequential(nn.BatchNorm2d(C), conv(3), nn.Identity()),
}


@pytest.mark.parametrize("how", IDENTITIES)
@pytest.mark.parametrize("branch", ["3x3", "5x5 and norm"])
def test_a_residual_identity(how, branch):
    folds(made(IDENTITIES[how], a=BRANCHES[branch]()))


@pytest.mark.parametrize("branch", BRANCHES)
def test_an_identity_around_any_branch(branch):
    folds(made(IDENTITIES["a(x) + x"], a=BRANCHES[branch]()))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_an_identity_around_mirrored_padding(mode):
    folds(made(IDENTITIES["a(x) + x"], a=conv(3, padding_mode=mode)))


@pytest.mark.parametrize("rank", [1, 3])
def test_an_identity_in_other_ranks(rank):
    branch = nn.Sequential(CONV[rank - 1](C, C, 3, padding=1, bias=False), NORM[rank - 1](C))
    shape = (C, *(7, 6, 5)[:rank])
    folds(made(IDENTITIES["a(x) + x"], a=branch), shape=shape, shapes=[shape, (C, *(1, 1, 2)[:rank])])


def test_an_identity_with_a_norm():
    folds(made(lambda self, x: self.a(x) + self.n(x), a=normed(), n=nn.BatchNorm2d(C)))


def test_the_norm_after_the_sum():
    folds(made(lambda self, x: self.n(self.a(x) + x), a=normed(), n=nn.BatchNorm2d(C)))


def test_a_join_that_goes_on():
    """The sum is the first of a run: 3x3 with its identity, then 1x1, one convolution in all."""
    folds(made(lambda self, x: self.c(self.a(x) + x), a=normed(), c=conv(1, outputs=2)))
    folds(made(lambda self, x: self.c(self.a(x) + x), a=normed(1), c=conv(3, outputs=2)))


def test_a_stack_of_residual_blocks():
    """1x1s with identities and a 3x3 at the end: everything is linear and exact."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x) + x
        return x

    folds(made(forward, blocks=nn.ModuleList([normed(1), normed(1), normed(3)])))


# Parallel branches ---------------------------------------------------------------------------------------------------


PARALLEL = {
    "3x3 and 1x1": lambda: (conv(3), conv(1)),
    "5x5, 3x3 and 1x1 with norms": lambda: (normed(5), normed(3), normed(1)),
    "strided": lambda: (normed(3, stride=2, outputs=6), normed(1, stride=2, outputs=6)),
    "groups": lambda: (conv(3, groups=2), conv(3, groups=C), conv(1)),
    "dilations": lambda: (conv(3, dilation=2, padding=2), conv(3, dilation=1), conv(3, dilation=3, padding=3)),
    "asymmetric kernels": lambda: (
        nn.Conv2d(C, C, (1, 3), padding=(0, 1)),
        nn.Conv2d(C, C, (3, 1), padding=(1, 0)),
        conv(3),
    ),
    "the same twice over": lambda: (conv(3), conv(3)),
    "runs in branches": lambda: (nn.Sequential(conv(1, outputs=7), conv(3, inputs=7)), conv(5)),
    "same and by number": lambda: (nn.Conv2d(C, C, 3, padding="same"), conv(5)),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_convolutions(name):
    def forward(self, x):
        total = self.parts[0](x)
        for part in self.parts[1:]:
            total = total + part(x)
        return total

    folds(made(forward, parts=nn.ModuleList(PARALLEL[name]())))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_repvgg_block_is_one_convolution(stride):
    """Identity with a norm, 1x1 and 3x3, each with its own."""

    def forward(self, x):
        identity = 0 if self.identity is None else self.identity(x)
        return self.relu(self.dense(x) + self.point(x) + identity)

    parts = {"dense": normed(3, stride=stride), "point": normed(1, stride=stride), "relu": nn.ReLU()}
    folds(made(forward, **parts, identity=nn.BatchNorm2d(C) if stride == 1 else None))


def test_nested_sums():
    def forward(self, x):
        return self.a(x) + (self.b(x) + (self.c(x) + x)) + self.n(x)

    folds(made(forward, a=normed(3), b=conv(1), c=normed(5), n=nn.BatchNorm2d(C)))


def test_a_sum_within_a_branch_of_a_sum():
    def forward(self, x):
        inner = self.a(x) + self.b(x)
        return self.c(inner) + x

    folds(made(forward, a=normed(1), b=conv(1), c=normed(3)))
    folds(made(forward, a=normed(3), b=conv(1), c=normed(1)))


def test_pythons_own_sum():
    """It begins with 0 + tensor: right whether it folds or not."""
    model = made(lambda self, x: sum(part(x) for part in self.parts), parts=nn.ModuleList([conv(3), conv(1)]))
    assert assert_agree(merge(model), model, *SHAPES)


def test_the_gate_looks_at_sums_too():
    """Two 3x3s in parallel are one 3x3 for half the multiply-adds; an identity alone gains none."""
    model = made(lambda self, x: self.a(x) + self.b(x), a=conv(), b=conv())
    merged = merge(model, gate="multiply_adds")
    assert counts(merged, picture(C, 9, 9)).convs == 1
    assert assert_agree(merged, model, *SHAPES)
    merged = merge(model, gate="multiply_adds", min_gain=2.5)
    assert counts(merged, picture(C, 9, 9)).convs == 2
    assert assert_agree(merged, model, *SHAPES)


# Sums that do not fold -----------------------------------------------------------------------------------------------


def written_over(self, x):
    y = self.a(x)
    x = self.s(x)
    z = self.b(x)
    x.mul_(2.0)
    return z + x + y


def aliased(self, x):
    y = self.s(x)
    z = y.view(y.shape)
    y += self.a(y)
    return y + z


def summed_in_place(self, x):
    x = self.s(x)
    x += self.a(x)
    return x


def kept(self, x):
    y = self.a(x)
    return y + x, y.mean((2, 3))


def input_kept(self, x):
    x = self.s(x)
    return self.a(x) + x, x


OPEN = {
    "the sum's operand is read elsewhere": (kept, {"a": conv}),
    "the identity is read elsewhere": (input_kept, {"s": lambda: conv(1), "a": conv}),
    "the input is written over": (written_over, {"a": conv, "b": conv, "s": lambda: conv(1)}),
    "in place on an alias": (aliased, {"a": conv, "s": lambda: conv(1)}),
    "in place": (summed_in_place, {"a": conv, "s": lambda: conv(1)}),
    "torch.add by name": (lambda self, x: torch.add(input=x, other=self.a(x)), {"a": conv}),
    "add": (lambda self, x: x.add(self.a(x)), {"a": conv}),
    "add_": (lambda self, x: self.a(x).add_(x), {"a": conv}),
    "alpha of one": (lambda self, x: torch.add(self.a(x), x, alpha=1), {"a": conv}),
    "alpha": (lambda self, x: torch.add(self.a(x), x, alpha=0.5), {"a": conv}),
    "alpha by method": (lambda self, x: self.a(x).add(self.b(x), alpha=3), {"a": conv, "b": conv}),
    "a difference": (lambda self, x: self.a(x) - x, {"a": conv}),
    "a difference of branches": (lambda self, x: self.a(x) - self.b(x), {"a": conv, "b": conv}),
    "reversed difference": (lambda self, x: torch.rsub(self.a(x), x), {"a": conv}),
    "broadcast channels": (lambda self, x: self.a(x) + self.b(x), {"a": conv, "b": lambda: conv(outputs=1)}),
    "broadcast maps": (lambda self, x: self.a(x) + x.mean((2, 3), keepdim=True), {"a": conv}),
    "an identity that broadcasts": (lambda self, x: self.a(x) + x[:, :1], {"a": conv}),
    "a number": (lambda self, x: self.a(x) + 1.5, {"a": conv}),
    "a parameter": (lambda self, x: self.a(x) + self.n.weight.view(1, -1, 1, 1), {"a": conv, "n": lambda: normed()[1]}),
    "scaled": (lambda self, x: self.a(x) * 0.3 + x, {"a": conv}),
    "twice itself": (lambda self, x: self.a(x) + self.a(x), {"a": conv}),
    "doubled": (lambda self, x: (lambda y: y + y)(self.a(x)), {"a": conv}),
    "a product": (lambda self, x: self.a(x) * self.b(x), {"a": conv, "b": conv}),
    "activated branch": (lambda self, x: torch.relu(self.a(x)) + self.b(x), {"a": conv, "b": conv}),
    "two inputs": (lambda self, x: self.a(x) + self.b(torch.relu(x)), {"a": conv, "b": conv}),
    "a transposed identity": (lambda self, x: self.a(x) + x.flip(3), {"a": conv}),
    "joined along channels": (lambda self, x: torch.cat([self.a(x), x], 1), {"a": conv}),
    "one branch over another's output": (lambda self, x: (lambda y: self.b(y) + y)(self.a(x)), {"a": conv, "b": conv}),
    "paddings of two modes": (
        lambda self, x: self.a(x) + self.b(x),
        {"a": conv, "b": lambda: conv(padding_mode="reflect")},
    ),
    "even kernels": (
        lambda self, x: self.a(x) + self.b(x),
        {"a": lambda: conv(2, padding=1), "b": lambda: conv(4, padding=2)},
    ),
    "a branch that is not exact": (lambda self, x: self.a(x) + x, {"a": lambda: nn.Sequential(conv(), conv())}),
    "x twice": (lambda self, x: self.a(x) + x + x, {"a": conv}),
    "a detached branch": (lambda self, x: self.a(x).detach() + x, {"a": conv}),
    "out=": (lambda self, x: torch.add(self.a(x), x, out=torch.empty_like(x)), {"a": conv}),
}


@pytest.mark.parametrize("name", OPEN)
def test_other_sums_stay_right(name):
    """Folded or not; and not at all where it cannot be."""
    forward, parts = OPEN[name]
    model = made(forward, **{key: make() for key, make in parts.items()})
    for gate in ("always", "multiply_adds"):
        merged = merge(model, gate=gate)
        assert assert_agree(merged, model, *SHAPES)


@pytest.mark.parametrize("first", [True, False])
def test_different_strides_are_not_one(first):
    """Of one size both have the same map; at every other size the sum raises, and goes on raising."""
    a, b = conv(3, stride=2), nn.Conv2d(C, C, 3)
    model = made(lambda self, x: self.a(x) + self.b(x), **({"a": a, "b": b} if first else {"a": b, "b": a}))
    merged = merge(model, example_inputs=picture(C, 5, 5))
    assert counts(merged, picture(C, 5, 5)).convs == 2
    assert assert_agree(merged, model, *[(C, size, size) for size in range(2, 12)]) >= 1


def test_maps_of_two_sizes_that_broadcast():
    """An unpadded 3x3 makes 1x1 of a 3x3 picture, and that is added everywhere; at other sizes the sum raises."""
    model = made(lambda self, x: self.a(x) + x, a=conv(3, padding=0))
    merged = merge(model, example_inputs=picture(C, 3, 3))
    assert assert_agree(merged, model, *[(C, size, size) for size in range(1, 9)]) == 1


def test_channels_that_broadcast_are_no_identity():
    model = made(lambda self, x: self.a(x) + x, a=conv(3, inputs=1, outputs=C))
    merged = merge(model)
    assert assert_agree(merged, model, (1, 7, 8), (1, 2, 2)) == 2


def test_a_hook_between_branch_and_sum_is_called():
    model = made(lambda self, x: self.a(x) + self.b(x), a=conv(), b=conv())
    seen = []
    model.b.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    merged = merge(model)
    merged_seen = len(seen)
    with torch.no_grad():
        assert_near(merged(picture(C, 8, 8)), model(picture(C, 8, 8)))
    assert len(seen) == merged_seen + 2


def test_drop_path_and_layer_scale_in_a_branch():
    from timm.layers import DropPath

    def forward(self, x):
        return self.drop(self.a(x)) + x

    folds(made(forward, a=normed(), drop=DropPath(0.3)))


def test_joins_in_modules_of_one_class():
    """Two instances, one folds and one has its branch read elsewhere: each is what it was."""

    class Block(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.a, self.keep = normed(3), nn.Identity() if keep else None

        def forward(self, x):
            y = self.a(x)
            return (y + x) * y.mean() if self.keep is not None else y + x

    model = settle(nn.Sequential(Block(False), nn.ReLU(), Block(True), nn.ReLU(), Block(False)))
    merged = merge(model)
    assert assert_agree(merged, model, *SHAPES)
    ran = counts(merged, picture(C, 8, 8))
    assert (ran.convs, ran.sums) == (3, 1)
    assert all(isinstance(merged[at], Block) for at in (0, 2, 4))
    assert assert_agree(copy.deepcopy(merged), model, *SHAPES)


# Drawn sums ----------------------------------------------------------------------------------------------------------


def add_up(self, x):
    """Branches added one to another, each on x or on what the sum is so far."""
    total = None
    for part, (onto, order) in zip(self.parts, self.how, strict=True):
        value = part(total if onto and total is not None else x)
        if total is None:
            total = value
        elif order == 0:
            total = total + value
        elif order == 1:
            total = torch.add(value, total)
        else:
            total += value
    return total


@st.composite
def sums(draw):
    parts, how = [], []
    for _ in range(draw(st.integers(2, 4))):
        kernel = draw(st.sampled_from([1, 1, 3, 5]))
        options = {"groups": draw(st.sampled_from([1, 1, 2, 4])), "bias": draw(st.booleans())}
        options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "zeros", "circular"]))
        kind = draw(st.sampled_from(["conv", "conv", "normed", "norm", "identity"]))
        layers = [] if kind in ("norm", "identity") else [conv(kernel, **options)]
        layers += [nn.BatchNorm2d(C)] if kind in ("normed", "norm") else []
        parts.append(nn.Sequential(*layers, nn.Identity()))
        how.append((draw(st.booleans()), draw(st.integers(0, 2))))
    model = net(add_up, parts=nn.ModuleList(parts), stem=conv(1))
    model.how = tuple(how)
    return settle(model, draw(st.integers(0, 9)))


@settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(sums(), st.sampled_from(["always", "multiply_adds"]))
def test_drawn_sums(model, gate):
    before = counts(model, picture(C, 9, 9))
    merged = merge(model, gate=gate)
    assert assert_agree(merged, model, *SHAPES[:12:2], (C, 9, 12))
    after = counts(merged, picture(C, 9, 9))
    assert after.convs <= max(before.convs, 1) and after.sums <= before.sums
    with pytest.raises(nmconv.MergeError):
        merge(model.train())
