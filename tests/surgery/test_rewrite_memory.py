"""Rewritten blocks: in-place writes, views, and what autograd keeps."""

import pytest
import torch
import torch.nn.functional as F
from calls import calls_of
from oracle import assert_same, dropped
from rewrite_nets import apply, conv, convs, droppable, every_subset, everything, faithful, net, picture, planned
from torch import nn

import nmconv

torch.set_num_threads(1)


def assert_same_gradients(model, plan):
    """After one step backwards the converted model's parameters have the gradients that the oracle's have."""
    converted = apply(model, plan)
    with dropped(model, plan.changes):
        model(picture()).square().sum().backward()
    converted(picture()).square().sum().backward()
    for one, other in zip(model.parameters(), converted.parameters(), strict=True):
        assert_same(one.grad, other.grad)


def copies(model, plan):
    calls = calls_of(model, plan, picture())
    return [calls[site.id].copy for site in plan.sites if site.action != "skip"]


# --- memory --------------------------------------------------------------------------------------------------------


def test_no_copy_where_nobody_else_reads():
    def forward(self, x):
        y = self.relu1(self.bn(self.a(x)))
        y = F.relu(self.b(y))
        return self.relu2(self.c(y) + x)

    model = net(forward, **convs("a", "b", "c"), bn=nn.BatchNorm2d(4), relu1=nn.ReLU(), relu2=nn.ReLU())
    plan, _ = every_subset(model, count=3)
    assert copies(model, plan) == [False, False, False]


def test_no_copy_where_an_inplace_relu_follows_and_nobody_else_reads():
    def forward(self, x):
        y = F.relu(self.a(x))
        y = self.b(y)
        y += x
        return F.relu_(y)

    model = net(forward, **convs("a", "b"))
    plan, _ = every_subset(model, count=2)
    assert copies(model, plan) == [False, False]


def overwriting(how):
    """The un-activated value y is read again after z, which shares its memory once the activation is gone, changes."""

    def forward(self, x):
        y = self.a(x)
        gate = y.view(y.shape) if how == "view" else y
        z = F.relu(y)
        if how == "add_":
            z.add_(1)
        elif how == "iadd":
            z += 1
        elif how == "setitem":
            z[:, 0] = 1
        elif how == "slice":
            z[:, 0].add_(1)
        elif how in ("chunk", "split", "unbind", "torch.chunk", "torch.split", "torch.unbind", "torch.select"):
            part = {
                "chunk": lambda: z.chunk(2, 1)[0],
                "split": lambda: z.split(2, 1)[0],
                "unbind": lambda: z.unbind(1)[0],
                "torch.chunk": lambda: torch.chunk(z, 2, 1)[0],
                "torch.split": lambda: torch.split(z, 2, 1)[0],
                "torch.unbind": lambda: torch.unbind(z, 1)[0],
                "torch.select": lambda: torch.select(z, 1, 0),
            }[how]()
            part += 1
        elif how in ("view", "relu_"):
            F.leaky_relu_(z, -0.5)
        elif how == "flatten":
            z.flatten(2).mul_(2)
        elif how == "diagonal":
            z.diagonal(dim1=2, dim2=3).zero_()
        elif how == "narrow":
            torch.narrow(z, 1, 0, 2).zero_()
        elif how == "select":
            z.select(1, 0).zero_()
        elif how == "unfold":
            z.unfold(2, 2, 2).mul_(2)
        elif how == "dropout":
            F.dropout(z, 0.5, self.training, inplace=True)
        elif how == "module":
            self.inplace(z)
        elif how == "atleast":
            torch.atleast_3d(z).zero_()
        elif how == "tensor_split":
            torch.tensor_split(z, 2, 1)[0].zero_()
        elif how == "as_strided":
            z.as_strided((2, 2), (1, 1)).zero_()
        elif how == "numpy index":
            z[..., None].zero_()
        elif how == "T":
            z.mT.zero_()
        elif how == "copy_":
            z.copy_(x)
        elif how == "clamp_":
            torch.clamp_(z, 0, 0.5)
        elif how == "out":
            torch.add(z, 1, out=z)
        elif how == "zero_":
            z.zero_()
        elif how == "opaque":
            self.opaque(z)
        elif how == "checkerboard":
            z[:, ::2, ::2] *= 0
        elif how == "data":
            z.data.mul_(2)
        elif how == "detach":
            z.detach().mul_(2)
        elif how == "movedim":
            z.movedim(1, 3).mul_(2)
        elif how == "swapdims":
            torch.swapdims(z, 1, 2).mul_(2)
        elif how == "broadcast":
            torch.broadcast_tensors(z, z)[0].clamp_(0, 1)
        elif how == "identity module":
            self.nothing(z).mul_(2)
        elif how == "eval dropout module":
            self.drop(z).mul_(2)
        elif how == "lerp_":
            z.lerp_(x, 0.5)
        elif how == "scatter":
            z.index_fill_(1, torch.tensor([0]), 0) if False else z.masked_fill_(x > 0, 0)
        return self.b(z) * torch.sigmoid(gate.mean((2, 3), keepdim=True))

    def opaque(self, x):
        return x.mul_(2) if x.sum().item() > 0 else x.add_(1)

    return net(
        forward,
        **convs("a", "b"),
        inplace=nn.Hardtanh(inplace=True),
        opaque=net(opaque),
        nothing=nn.Sequential(nn.Identity(), nn.Sequential()),
        drop=nn.Dropout(0.5),
    )


@pytest.mark.parametrize(
    "how",
    [
        "none",
        "add_",
        "iadd",
        "setitem",
        "slice",
        "chunk",
        "split",
        "unbind",
        "torch.chunk",
        "torch.split",
        "torch.unbind",
        "torch.select",
        "view",
        "relu_",
        "flatten",
        "diagonal",
        "narrow",
        "select",
        "unfold",
        "dropout",
        "module",
        "atleast",
        "tensor_split",
        "as_strided",
        "T",
        "copy_",
        "clamp_",
        "out",
        "zero_",
        "opaque",
        "checkerboard",
        "data",
        "detach",
        "movedim",
        "swapdims",
        "broadcast",
        "lerp_",
        "scatter",
        "numpy index",
        "identity module",
        "eval dropout module",
    ],
)
def test_the_identity_copies_where_the_value_is_read_again(how):
    model = overwriting(how)
    plan = planned(model)
    site = next(site for site in droppable(plan) if site.convs == ("a",))
    converted = faithful(model, plan.edit({site.id: "drop"}), picture())
    assert len(nmconv.get_plan(converted).changes) == 1
    assert calls_of(model, plan, picture())[site.id].copy


def test_a_write_that_nobody_reads_by_its_own_name():
    """The other name of the memory is overwritten after the activation, by a call whose result is not used."""

    def forward(self, x):
        y = self.a(x)
        z = F.relu(y)
        y.mul_(2)
        return F.relu(self.b(z))

    every_subset(net(forward, **convs("a", "b")), count=2)


def test_a_write_that_also_reads_the_activated_value():
    """The written memory is the first operand's; that the second comes from the activation does not make it safe."""

    def forward(self, x):
        y = self.a(x)
        z = F.relu(y)
        y.add_(z)
        return F.relu(self.b(z))

    every_subset(net(forward, **convs("a", "b")), count=2)


def test_an_unread_write_to_what_a_gradient_needs():
    def forward(self, x):
        y = self.a(x)
        z = F.relu(y)
        w = self.b(z)  # keeps z for its weight's gradient
        y.add_(z)
        return F.relu(w)

    model = net(forward, **convs("a", "b"))
    plan, _ = every_subset(model, count=2)
    assert_same_gradients(model, plan)


@pytest.mark.parametrize("how", ["relu", "relu_", "sigmoid_"])
def test_a_write_to_what_the_call_before_keeps_for_its_gradient(how):
    """It stays, and needs what it made; the activation after it goes, and hands just that on to be overwritten."""

    def forward(self, x):
        y = getattr(torch, how)(self.a(x))
        z = F.silu(y)
        z.add_(1)
        return self.b(z)

    model = net(forward, **convs("a", "b"))
    plan = planned(model)
    site = next(site for site in droppable(plan) if site.function == "silu")
    plan = plan.edit({site.id: "drop"})
    faithful(model, plan, picture())
    assert_same_gradients(model, plan)


@pytest.mark.parametrize("how", ["activation", "sigmoid"])
def test_a_write_by_a_product_whose_written_operand_is_the_gate(how):
    def forward(self, x):
        y = F.relu_(self.a(x)) if how == "activation" else self.a(x).sigmoid_()
        z = F.silu(y)
        y.mul_(self.c(x))
        return F.relu(self.b(z)) + y

    every_subset(net(forward, **convs("a", "b", "c")), count=2)


def test_a_write_between_the_activation_and_its_reader_through_a_view():
    def forward(self, x):
        y = self.a(x)
        view = y.flatten(2)
        z = F.silu(y)
        F.relu_(view)
        return F.relu(self.b(z))

    every_subset(net(forward, **convs("a", "b")), count=2)


def test_two_dropped_activations_in_a_row_and_a_write_at_the_end():
    def forward(self, x):
        y = F.relu(self.a(x))
        z = F.silu(self.bn(y))
        w = F.relu(z.view(z.shape))
        w += 1
        return F.relu(self.b(w)) + z.mean() + y.mean()

    model = net(forward, **convs("a", "b"), bn=nn.Identity())
    everything(model)


def test_a_preactivation_of_the_input_itself_does_not_change_the_callers_tensor():
    def forward(self, x):
        y = F.relu(x)
        y += 1
        y = self.a(y)
        z = F.relu(y)
        return self.b(z)

    model = net(forward, **convs("a", "b"))
    everything(model)

    def forward(self, x):
        return self.relu(self.b(self.part(x)))

    def part(self, x):  # its own input belongs to others
        return F.relu(x)

    model = net(
        lambda self, x: self.relu(self.b(self.inner(x)) + x),
        inner=net(lambda self, x: self.c(F.relu(x))),
        b=conv(),
        relu=nn.ReLU(),
    )
    model.inner.c = conv()
    everything(model)


def test_both_values_are_returned():
    def forward(self, x):
        y = self.a(x)
        z = F.relu(y)
        return z, y[:, :1], self.b(z)

    model = net(forward, **convs("a", "b"))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = faithful(model, plan, picture())
    one, other, _ = converted(picture())
    before = other.clone()
    one.data.zero_()
    assert_same(other, before, "the caller overwrites one output and finds the other changed")


def test_in_place_operators_keep_who_is_who():
    def forward(self, x):
        x = self.a(x)
        y = x
        y += 1
        x = F.relu(x)
        z = x
        z *= 2
        z -= y
        z /= 4
        w = self.b(z)
        v = w
        v **= 2
        w = self.relu(w)
        w += v
        return self.relu(self.c(w)), x

    everything(net(forward, **convs("a", "b", "c"), relu=nn.ReLU()))


def test_numbers_are_not_tensors():
    def forward(self, x):
        n = x.size(0)
        m = n
        n += 1
        k = x.shape[1]
        k *= 2
        j = k
        j -= 1
        j //= 2
        q = x.shape[2] / 2
        q /= 3
        x = F.relu(self.a(x)) * n / m + k - j * q
        return F.relu(self.b(x)) * n**2

    every_subset(net(forward, **convs("a", "b")), count=2)


def test_gradients_are_the_same_and_autograd_does_not_complain():
    def forward(self, x):
        y = torch.sigmoid(self.a(x))
        z = F.relu(y)  # would hand on memory that sigmoid's gradient needs
        z += 1
        z = self.b(z)
        w = F.relu(z)
        w *= 2
        return self.relu(self.c(w))

    model = net(forward, **convs("a", "b", "c"), relu=nn.ReLU(inplace=True))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    assert plan.changes
    converted = apply(model, plan)
    with dropped(model, plan.changes):
        model(picture()).square().sum().backward()
    converted(picture()).square().sum().backward()
    for one, other in zip(model.parameters(), converted.parameters(), strict=True):
        assert_same(one.grad, other.grad)


# --- the shape of the memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["expand", "expand_as", "slice", "chunk", "step", "broadcast_to", "narrow"])
@pytest.mark.parametrize("then", ["view", "write", "read", "flatten"])
def test_an_activation_made_dense_what_was_a_part_or_an_expansion(how, then):
    """A call that allocates returns dense memory; without it a view of a part cannot be viewed or written alike."""

    def forward(self, x):
        y = self.a(x)
        if how == "expand":
            y = y.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)
        elif how == "expand_as":
            y = y.mean((2, 3), keepdim=True).expand_as(x)
        elif how == "broadcast_to":
            y = torch.broadcast_to(y.mean((2, 3), keepdim=True), x.shape)
        elif how == "slice":
            y = y[:, :, 1:, 1:]
        elif how == "chunk":
            y = torch.chunk(y, 2, 3)[0]
        elif how == "narrow":
            y = y.narrow(2, 0, 4)
        else:
            y = y[:, :, ::2, ::2]
        z = F.relu(y)
        if then == "view":
            z = z.view(z.shape[0], 4, -1, z.shape[2])
        elif then == "write":
            z += 1
        elif then == "flatten":
            return F.relu(self.b(z)), z.view(-1)
        return F.relu(self.b(z))

    model = net(forward, **convs("a", "b"))
    plan = planned(model)
    edited = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    faithful(model, edited, picture())
