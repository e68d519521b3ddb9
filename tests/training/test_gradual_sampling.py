"""``Gradual(..., sampling=True)``: a member is drawn at each update, the same wherever and whenever it is asked for."""

import copy
import json
import math
import random

import numpy
import pytest
import timm
import torch
from nets import conv, net
from torch import nn
from torch.utils.checkpoint import checkpoint

import nmconv

torch.set_num_threads(1)
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def gradual_net(sites=4):
    torch.manual_seed(0)
    parts = [part for at in range(sites) for part in (conv(4 if at else 3), nn.ReLU())]
    model = nn.Sequential(*parts, conv())
    plan = nmconv.make_plan(model, "1:1")
    return nmconv.apply_plan(model, plan.edit({site.id: "drop" for site in plan.sites}), gradual=True)


def draws(model, schedule, steps):
    found = []
    for n in steps:
        schedule.step_update(n)
        found.append(tuple(nmconv.get_slopes(model).values()))
    return found


def level(model, slope, **options):
    """A schedule that stays near a slope for many thousand updates."""
    schedule = nmconv.Gradual(model, 10**9, "linear", end=0.9, sampling=True, **options)
    first = round(slope * 0.9 * 10**9)
    assert schedule.slope_at(first + 5000) == pytest.approx(slope, abs=1e-5)
    return schedule, first


def test_two_ranks_draw_the_same():
    one, other = gradual_net(), gradual_net()
    options = {"total_steps": 100, "end": 0.9, "sampling": True, "seed": 5}
    first, second = nmconv.Gradual(one, **options), nmconv.Gradual(other, **options)
    torch.manual_seed(1)
    steps = range(100)
    found = draws(one, first, steps)
    torch.manual_seed(2)
    assert draws(other, second, steps) == found
    assert len(set(found)) > 10 and {slope for member in found for slope in member} == {0.0, 1.0}
    assert draws(other, second, reversed(steps)) == found[::-1]  # whatever was drawn before


def test_the_draw_is_the_same_in_every_process_and_release():
    model = gradual_net()
    schedule, first = level(model, 0.5, seed=7)
    found = draws(model, schedule, range(first, first + 4))
    assert found == [
        (0.0, 1.0, 0.0, 0.0),
        (1.0, 0.0, 0.0, 1.0),
        (1.0, 1.0, 0.0, 0.0),
        (1.0, 0.0, 1.0, 1.0),
    ]


def test_a_restart_goes_on_with_the_same_draws():
    model, again = gradual_net(), gradual_net()
    schedule = nmconv.Gradual(model, 40, sampling=True, seed=3)
    schedule.step_update(12)
    state = json.loads(json.dumps(schedule.state_dict()))
    assert (state["sampling"], state["seed"], state["step"]) == (True, 3, 12)
    other = nmconv.Gradual(again, 1000)
    other.load_state_dict(state)
    assert nmconv.get_slopes(again) == nmconv.get_slopes(model)
    assert draws(again, other, range(13, 24)) == draws(model, schedule, range(13, 24))
    assert other.state_dict() == schedule.state_dict()
    for wrong in (
        {**state, "seed": 0.5},
        {**state, "sampling": 1},
        {key: state[key] for key in state if key != "seed"},
    ):
        with pytest.raises(nmconv.OptionError):
            other.load_state_dict(wrong)


@pytest.mark.parametrize("slope", [0.1, 0.5, 0.75])
def test_frequencies_and_independence(slope):
    model = gradual_net()
    schedule, first = level(model, slope)
    count = 4000
    found = torch.tensor(draws(model, schedule, range(first, first + count)), dtype=torch.float64)
    error = math.sqrt(slope * (1 - slope) / count)
    assert ((found.mean(0) - slope).abs() < 4 * error).all()
    centred = (found - slope) / math.sqrt(slope * (1 - slope))
    correlations = centred.T @ centred / count - torch.eye(4, dtype=torch.float64)
    assert (correlations.fill_diagonal_(0).abs() < 4 / math.sqrt(count)).all()
    following = (centred[1:] * centred[:-1]).mean(0)  # from update to update
    assert (following.abs() < 4 / math.sqrt(count)).all()
    seeds = nmconv.Gradual(model, 10**9, "linear", end=0.9, sampling=True, seed=1)
    other = torch.tensor(draws(model, seeds, range(first, first + count)), dtype=torch.float64)
    between = (centred * (other - slope)).mean(0) / math.sqrt(slope * (1 - slope))
    assert (between.abs() < 4 / math.sqrt(count)).all()


def test_a_site_is_drawn_alike_whatever_other_sites_there_are():
    short, long = gradual_net(2), gradual_net(4)
    one, first = level(short, 0.5)
    other, _ = level(long, 0.5)
    steps = range(first, first + 30)
    assert draws(short, one, steps) == [member[:2] for member in draws(long, other, steps)]


def test_both_ends():
    model = gradual_net()
    schedule = nmconv.Gradual(model, 100, start=0.3, end=0.6, sampling=True)
    assert set(draws(model, schedule, range(31))) == {(0.0,) * 4}
    assert set(draws(model, schedule, range(60, 140))) == {(1.0,) * 4}
    assert len(set(draws(model, schedule, range(31, 60)))) > 3


def test_global_random_states_stay():
    model = gradual_net()
    states = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    schedule = nmconv.Gradual(model, 10, sampling=True)
    draws(model, schedule, range(11))
    schedule.load_state_dict(schedule.state_dict())
    schedule.finish()
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def blocks():
    """Three checkpointed blocks of two sites each; in-place, shared and functional ones."""

    def block(self, x):
        return torch.relu_(self.two(self.act(self.one(x)))) + x

    def forward(self, x):
        x = self.stem(x)
        for part in self.parts:
            x = part(x) if self.how is None else checkpoint(part, x, use_reentrant=self.how)
        return self.head(x)

    torch.manual_seed(0)
    made = [net(block, one=conv(), two=conv(), act=nn.ReLU(True)) for _ in range(3)]
    return net(forward, stem=conv(3), parts=nn.ModuleList(made), head=conv(), how=None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_run_as_the_same_member(reentrant):
    model = blocks()
    plan = nmconv.make_plan(model, "1:1")
    plan = plan.edit({site.id: "drop" for site in plan.sites if site.is_real})
    soft = nmconv.apply_plan(model, plan, gradual=True)
    assert len(nmconv.get_slopes(soft)) == 6
    schedule = nmconv.Gradual(soft, 40, "linear", end=0.9, sampling=True)
    members, losses = set(), set()
    for n in range(10, 20):
        schedule.step_update(n)
        members.add(tuple(nmconv.get_slopes(soft).values()))
        hard = nmconv.apply_plan(
            model, plan.edit({s: "drop" if v else "keep" for s, v in nmconv.get_slopes(soft).items()})
        )
        found = []
        for each, how in ((soft, reentrant), (soft, None), (hard, None)):
            each.zero_grad()
            each.how = how
            loss = each(X.clone().requires_grad_()).square().mean()
            torch.rand(3)  # what others draw in between changes nothing
            loss.backward()
            found.append([loss.detach(), *(value.grad.clone() for value in each.parameters())])
        losses.add(float(found[0][0]))
        for checkpointed, plainly, dropped in zip(*found, strict=True):
            assert torch.equal(checkpointed, plainly) and torch.equal(checkpointed, dropped)
    assert len(members) > 4 and len(losses) == len(members)


def test_micro_batches_see_one_member():
    model = gradual_net()
    schedule, first = level(model, 0.5)
    schedule.step_update(first)
    before = nmconv.get_slopes(model)
    for _ in range(3):
        model.train()(X).mean().backward()
        model.eval()(X)
    assert nmconv.get_slopes(model) == before


def test_followers_get_the_soft_slope():
    model = timm.create_model("resnet18")
    soft = nmconv.convert(model, "2:1", gradual=True)
    ema = timm.utils.ModelEmaV3(soft)
    schedule = nmconv.Gradual(soft, 100, "linear", end=0.8, followers=[ema.module], sampling=True)
    schedule.step_update(40)
    assert set(nmconv.get_slopes(soft).values()) == {0.0, 1.0}
    assert set(nmconv.get_slopes(ema.module).values()) == {schedule.slope_at(40)} == {0.5}
    nmconv.set_slope(soft, schedule.slope_at(40))
    assert nmconv.get_slopes(soft) == nmconv.get_slopes(ema.module)
    schedule.step_update(80)
    schedule.finish()
    assert nmconv.get_slopes(soft) == nmconv.get_slopes(ema.module) == {}


def test_finishing():
    model = gradual_net(1)
    hard = copy.deepcopy(model)
    nmconv.Gradual(hard, 1, end=0).finish()
    schedule, first = level(model, 0.5)
    steps = range(first, first + 50)
    dropped = next(n for n, member in zip(steps, draws(model, schedule, steps), strict=True) if member == (1.0,))
    schedule.step_update(dropped)
    with pytest.warns(nmconv.SlopeWarning, match=r"a slope of 0\.5"):  # the draw drops all, the schedule does not
        schedule.finish()
    schedule.step_update(dropped + 1)
    assert repr(model) == repr(hard) and torch.equal(model(X), hard(X))


@pytest.mark.parametrize("options", [{"sampling": 1}, {"sampling": "yes"}, {"seed": -1}, {"seed": 1.0}, {"seed": True}])
def test_options_are_checked(options):
    model = gradual_net()
    with pytest.raises(nmconv.OptionError, match=next(iter(options))):
        nmconv.Gradual(model, 10, **options)
    assert set(nmconv.get_slopes(model).values()) == {0.0}


def test_without_sampling_nothing_is_drawn():
    model = gradual_net()
    schedule, first = nmconv.Gradual(model, 100, "linear", end=0.8, seed=3), 40
    schedule.step_update(first)
    assert set(nmconv.get_slopes(model).values()) == {0.5}


def test_training_by_sampling_ends_at_the_hard_conversion():
    model = gradual_net().train()
    plan = nmconv.get_plan(model)
    schedule = nmconv.Gradual(model, 12, end=0.5, sampling=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for n in range(1, 13):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(n)
    state = copy.deepcopy(model.state_dict())
    schedule.finish()
    parts = [part for at in range(4) for part in (conv(4 if at else 3), nn.Identity())]
    hard = nn.Sequential(*parts, conv())
    hard.load_state_dict(state)
    assert plan == nmconv.get_plan(model) and torch.equal(model(X), hard(X))
