"""Gradual sites in odd places: one activation in several slots, models inside of others, classes of the user's."""

import copy

import pytest
import torch
from torch import nn

import nmconv


def conv(inputs=4):
    return nn.Conv2d(inputs, 4, 3, padding=1)


X = torch.randn(2, 3, 12, 12)


@pytest.mark.parametrize("keep", ["first", "boundary"])
@pytest.mark.parametrize("ratio", ["2:1", "3:1"])
@pytest.mark.parametrize("act", [nn.ReLU, lambda: nn.ReLU(inplace=True), nn.SiLU, nn.PReLU])
def test_one_activation_in_several_slots(act, ratio, keep):
    shared = act()
    net = nn.Sequential(conv(3), shared, nn.Sequential(conv(), shared, conv(), shared), conv(), shared)
    soft, hard = (nmconv.convert(net, ratio, keep=keep, gradual=way, example_inputs=X) for way in (True, False))
    assert torch.equal(soft(X), net(X)) and not torch.equal(hard(X), net(X))
    nmconv.set_slope(soft, 1.0)
    assert torch.equal(soft(X), hard(X))


def test_members_of_a_network_with_one_activation_in_several_slots():
    shared = nn.ReLU()
    net = nn.Sequential(conv(3), shared, conv(), shared, conv(), shared, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert sorted(nmconv.ensemble.members(net, X, 0.5, n="all").kept) == [0, 1, 1, 1, 2, 2, 2, 3]


def test_the_witness_sees_a_wrong_site_being_mixed(monkeypatch):
    """The activation of another slot goes: what is mixed is not what the plan says."""
    from nmconv.surgery.apply import Surgery

    genuine, shared = Surgery._prepare_gradual_swap, nn.ReLU()
    net = nn.Sequential(conv(3), shared, conv(), shared, conv(), nn.ReLU())

    def begin(self, act, holder, slot, call):
        genuine(self, act, holder, "1", call)

    monkeypatch.setattr(Surgery, "_prepare_gradual_swap", begin)
    with pytest.raises(nmconv.WitnessError):
        nmconv.convert(net, "2:1", keep="first", gradual=True, example_inputs=X)


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def finished(model):
    nmconv.Gradual(model, 1, end=0).finish()
    return model


@pytest.mark.parametrize("act", [nn.PReLU, "own"])
def test_parameters_that_nobody_reads_are_frozen_at_the_end(act):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, input):
            return input * torch.sigmoid(self.scale * input)

    with nmconv.register(Scaled, "activation"):
        make = Scaled if act == "own" else act
        net = nn.Sequential(conv(3), make(), conv(), make(), conv())
        hard = nmconv.convert(net, "2:1", example_inputs=X)
        wanted = {name: value.requires_grad for name, value in hard.named_parameters()}
        assert not all(wanted.values())
        soft = nmconv.convert(net, "2:1", gradual=True, example_inputs=X)
        holder = finished(Holder(copy.deepcopy(soft)))
        assert {name: value.requires_grad for name, value in holder.model.named_parameters()} == wanted
        assert {name: value.requires_grad for name, value in finished(soft).named_parameters()} == wanted


@pytest.mark.parametrize("wrong", [{"schedule": ["cosine"]}, {"followers": None}, {"followers": 3}])
def test_wrong_options_of_a_schedule(wrong):
    soft = nmconv.convert(nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU()), "2:1", gradual=True, example_inputs=X)
    with pytest.raises(nmconv.OptionError, match=next(iter(wrong))):
        nmconv.Gradual(soft, 10, **wrong)
