"""Rewritten blocks: train and eval mode."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from calls import calls_of
from oracle import assert_same, record
from rewrite_nets import apply, conv, convs, droppable, faithful, net, outer, picture, planned
from torch import nn

import nmconv

torch.set_num_threads(1)


# --- modes ---------------------------------------------------------------------------------------------------------


def test_dropout_follows_the_mode_after_conversion():
    def part(self, x):
        x = F.relu(self.conv(x))
        x = F.dropout(x, 0.5, self.training)
        x = F.dropout(x, p=0.3, training=self.training, inplace=True)
        return F.relu(x)

    model = outer(net(part, conv=conv()))
    for training in (False, True):
        model.train(training)
        plan = planned(model)
        plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
        converted = faithful(model, plan, picture())
        x = picture()
        assert_same(converted.eval()(x), converted(x))
        torch.manual_seed(0)
        one = converted.train()(x)
        assert not torch.equal(one, converted(x))
        converted.block.eval()
        assert_same(converted(x), converted.eval()(x))


def test_a_forward_with_other_calls_in_train_mode():
    def part(self, x):
        if self.training:
            x = F.relu(self.only(x))
            x = F.relu(self.conv(x))
            return F.relu(self.conv2(x))
        return F.relu(self.conv2(F.relu(self.conv(x))))

    model = outer(net(part, **convs("only", "conv", "conv2")))
    plan = planned(model)
    for site in droppable(plan):
        faithful(model, plan.edit({site.id: "drop"}), picture())
    faithful(model, plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop")), picture())


def test_calls_that_run_in_training_first_do_not_shift_the_others():
    def forward(self, x):
        if self.training:
            x = F.relu(self.extra(x), inplace=True)
        x = F.relu(self.a(x))
        return F.relu(self.b(x))

    model = net(forward, **convs("extra", "a", "b"))
    plan = planned(model)
    with record(model.train()) as entries:
        model(picture())
    for site in plan.sites:
        call = site.train_call if site.modes == "both" else site.call
        inplace = calls_of(model, plan, picture())[site.id].inplace
        assert entries[call - 1].inplace == inplace, site
        assert (site.modes == "train") == inplace
    for site in droppable(plan):
        faithful(model, plan.edit({site.id: "drop"}), picture())


def test_the_mode_of_another_module_is_refused_or_followed():
    def part(self, x):
        return F.dropout(F.relu(self.conv(x)), 0.5, self.conv.training)

    model = outer(net(part, conv=conv()))
    plan = planned(model)
    plan = plan.edit(dict.fromkeys((site.id for site in droppable(plan)), "drop"))
    converted = faithful(model, plan, picture())
    converted.block.conv.train()
    assert not torch.equal(converted(picture()), converted(picture()))


def both_modes(how):
    """Forwards in which what comes before a call differs between the modes; the call itself is one and the same."""

    def clamped_in_eval(self, x):
        if not self.training:
            x = x.clamp(-1, 1)
        x = self.act(x)
        return F.relu(self.b(F.relu(self.a(x) + x)))

    def relu_in_train(self, x):
        if self.training:
            x = F.relu(x, True)
        y = F.relu(self.a(x), inplace=True)
        y = self.act(self.b(y) + x)
        F.relu_(x.chunk(2, 1)[1])
        return F.relu(self.c(y)) + self.act2(self.d(x))

    def written_in_train(self, x):
        y = self.act(self.a(x))
        if self.training:
            y.mul_(0.5)
        z = self.act2(self.b(y) + y)
        return F.relu(self.c(F.relu(self.d(z))))

    def same_conv(self, x):
        if self.training:
            x = F.relu(self.a(x))
        x = F.relu(self.a(x), inplace=True)
        return F.relu(self.b(x))

    def two_of_three(self, x):
        for at in range(3 if self.training else 2):
            x = F.relu(self.a(x) + at)
        return F.relu(self.b(x))

    def other_branch(self, x):
        if self.training:
            x = self.act(self.a(x))
            x = self.act(self.b(x)) * 2
        else:
            x = self.act(self.a(x) + 1)
        return self.act(self.c(x))

    def another_order(self, x):
        one, other = F.relu(self.a(x)), None
        if self.training:
            other = F.silu(self.b(x))
            one = F.silu(self.c(one))
        else:
            one = F.silu(self.c(one))
            other = F.silu(self.b(x))
        return one + other

    def behind_a_child(self, x):
        x = self.child(x)
        return F.relu(self.b(F.silu(x, inplace=True)))

    def aux(self, x):
        x = self.act(self.a(x))
        extra = self.act(self.d(self.act(self.c(x)))) if self.training else None
        return self.act(self.b(x)), extra

    forward = locals()[how]
    child = net(lambda self, x: F.elu(self.a(x)) if self.training else self.a(x), a=conv())
    return net(forward, **convs("a", "b", "c", "d"), act=nn.SiLU(inplace=True), act2=nn.SiLU(), child=child)


MODES = ["clamped_in_eval", "relu_in_train", "written_in_train", "same_conv", "two_of_three", "other_branch"]
MODES += ["another_order", "aux", "behind_a_child"]


# --- the same call in both modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", MODES)
def test_the_plan_names_every_call_once_in_each_mode(how):
    model = both_modes(how)
    plan = planned(model)
    calls = calls_of(model, plan, picture())
    for training in (False, True):
        with record(model.train(training)) as entries:
            model(picture())
        real = [(entry.owner, entry.name or entry.owner, entry.call, entry.inplace) for entry in entries]
        found = [
            (
                site.owner,
                site.name,
                site.train_call if training and site.modes == "both" else site.call,
                calls[site.id].inplace,
            )
            for site in plan.sites
            if site.modes in ("both", "train" if training else "eval") and "never calls it" not in site.reason
        ]
        assert sorted(found) == sorted(real), f"training={training}"


@pytest.mark.parametrize("how", MODES)
def test_every_choice_of_calls_is_done_right_in_both_modes(how):
    model = both_modes(how)
    plan = planned(model)
    sites = droppable(plan)
    for gone in itertools.islice(itertools.product((False, True), repeat=len(sites)), 1, 64):
        edits = {site.id: "drop" if drop else "keep" for site, drop in zip(sites, gone, strict=True)}
        try:
            apply(model, plan.edit(edits))
        except nmconv.RewriteError as error:
            assert "one decision would change several" in str(error) or "cannot be rewritten: " in str(error)
            continue
        faithful(model, plan.edit(edits), picture())


def test_a_module_call_that_is_the_same_in_both_modes_is_one_site():
    for how in ("clamped_in_eval", "relu_in_train", "written_in_train"):
        plan = planned(both_modes(how))
        assert [site.modes for site in plan.sites if site.name == "act"] == ["both"], how
