"""N:M units within chains, and `relocate` (docs/words.md)."""

from __future__ import annotations

import pytest
import torch
from nets import conv, convs, expect, inverted, net, norms, relus
from torch import nn
from zoo import models as zoo

import nmconv
from nmconv.finding import structure_of
from nmconv.flow import record_model
from nmconv.planning import changes_of


def post(count: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(count) for part in (conv(), nn.ReLU())))


def pre(count: int) -> nn.Module:
    return nn.Sequential(nn.MaxPool2d(2), *(part for _ in range(count) for part in (nn.ReLU(), conv())))


def kept(model: nn.Module, ratio: object, **options) -> tuple[list[int], list[int]]:
    """Which activations stay, by position, and the unit of each."""
    plan = nmconv.make_plan(model, ratio, **{"keep": "boundary", **options})
    assert {site.chain for site in plan.sites} == {plan.sites[0].chain}
    stay = [at for at, site in enumerate(plan.sites) if site.action == "keep"]
    return stay, [site.unit for site in plan.sites]


# --- Unit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "keep", "stay"),
    [
        ("1:1", "boundary", [0, 1, 2, 3, 4, 5, 6]),
        ("2:1", "boundary", [1, 3, 5, 6]),
        ("3:2", "boundary", [1, 2, 4, 5, 6]),
        ("3:1", "boundary", [2, 5, 6]),
        ("4:1", "boundary", [3, 6]),
        ("5:3", "boundary", [2, 3, 4, 5, 6]),
        ("8:1", "boundary", [6]),
        ("7:2", "boundary", [5, 6]),
        ("2:1", "first", [0, 2, 4, 6]),
        ("3:2", "first", [0, 1, 3, 4, 6]),
        ("3:1", "first", [0, 3, 6]),
        ("4:1", "first", [0, 4]),
        ("2:1", "spread", [1, 3, 5, 6]),
        ("3:1", "spread", [2, 5, 6]),
    ],
)
def test_units_of_a_chain_of_seven(ratio, keep, stay):
    """The tail is a shorter unit of r convs, which keeps ceil(r M / N)."""
    n = int(ratio.partition(":")[0])
    assert kept(post(7), ratio, keep=keep) == (stay, [at // n for at in range(7)])


@pytest.mark.parametrize(
    ("ratio", "keep", "stay"),
    [
        ("2:1", "boundary", [0, 2, 4]),
        ("3:2", "boundary", [0, 1, 3, 4]),
        ("3:1", "boundary", [0, 3]),
        ("4:1", "boundary", [0, 4]),
        ("2:1", "first", [1, 3, 4]),
        ("3:2", "first", [1, 2, 3, 4]),
        ("3:1", "first", [2, 4]),
        ("4:1", "first", [3, 4]),
        ("2:1", "spread", [0, 2, 4]),
    ],
)
def test_units_of_a_pre_activation_chain_of_five(ratio, keep, stay):
    n = int(ratio.partition(":")[0])
    assert kept(pre(5), ratio, keep=keep) == (stay, [at // n for at in range(5)])


@pytest.mark.parametrize(
    ("ratio", "last", "front"), [("4:2", {1, 3}, {0, 2}), ("6:3", {1, 3, 5}, {0, 2, 4}), ("6:2", {2, 5}, {0, 3})]
)
def test_spread_spaces_them_evenly(ratio, last, front):
    n = int(ratio[0])
    assert set(kept(post(n), ratio, keep="spread")[0]) == last
    assert set(kept(pre(n), ratio, keep="spread")[0]) == front


@pytest.mark.parametrize("ratio", ["3:2", "5:3", "5:4", "7:3"])
def test_spread_keeps_the_share(ratio):
    n, m = map(int, ratio.split(":"))
    assert len(kept(post(n), ratio, keep="spread")[0]) == m
    assert len(kept(pre(n), ratio, keep="spread")[0]) == m


def test_a_callable_decides_for_itself():
    asked = []

    def middle(unit):
        asked.append(unit)
        return [1]

    assert kept(post(7), "3:1", keep=middle)[0] == [1, 4, 6]
    assert [(unit.unit, unit.allowed, unit.pre) for unit in asked] == [(0, 1, False), (1, 1, False)]
    assert asked[0].convs == (("0",), ("2",), ("4",))
    assert asked[0].sites == ("1#1", "3#1", "5#1")
    assert asked[0].owners == (0, 1, 2)
    assert kept(pre(3), "3:1", keep=lambda unit: [1] if unit.pre else [])[0] == [1]
    assert kept(post(3), "3:1", keep=lambda unit: [])[0] == []
    assert kept(post(3), "3:2", keep=lambda unit: {2})[0] == [2]


def test_a_unit_that_has_few_enough_is_left_alone():
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())  # three convs, two activations
    assert kept(model, "3:2") == ([0, 1], [0, 0])
    assert kept(model, "3:1") == ([1], [0, 0])
    assert kept(model, "3:1", keep="first") == ([0], [0, 0])
    assert kept(model, "2:1") == ([1], [0, 0])
    assert kept(model, "4:1") == ([1], [0, 0])

    def never(unit):
        raise AssertionError(unit)

    assert kept(model, "3:2", keep=never) == ([0, 1], [0, 0])


def test_units_count_from_the_chains_first_conv():
    def forward(self, x):
        h = self.a1(self.c1(x))
        h = self.a5(self.c5(self.a4(self.c4(self.a3(self.c3(self.a2(self.c2(h))))))))
        return h + x

    model = net(forward, **convs("c1 c2 c3 c4 c5"), **relus("a1 a2 a3 a4 a5"))
    text = "a1 drop c1 A0 \n a2 keep c2 A0 \n a3 drop c3 A1 \n a4 keep c4 A1 \n a5 keep c5 A2"
    expect(model, text, convs=5)


def actions(model: nn.Module, ratio: str, **options) -> list[str]:
    return [
        site.action for site in nmconv.make_plan(model, ratio, relocate=True, **{"keep": "boundary", **options}).sites
    ]


# --- relocate ------------------------------------------------------------------------------------------------------


def test_relocate_makes_a_true_unit_of_an_inverted_residual():
    model = nn.Sequential(inverted(True), inverted(False), conv(), nn.ReLU())
    text = """
        0.a1 drop 0.c1 A0 post
        0.a2 move 0.c2 A0 post
        1.a1 drop 1.c1 B0 post
        1.a2 move 1.c2 B0 post
        3 keep 2 C0 post
    """
    plan = expect(model, text, "3:1", relocate=True, convs=7)
    assert plan.counts.activations_after == 3
    assert [plan.sites[at].behind for at in (1, 3)] == ["0.c3", "1.c3"]
    structure = structure_of(model, record_model(model, both_sizes=False))
    one, two = (change.place for change in changes_of(plan, structure).made if change.place is not None)
    # behind the add of the first block, behind the norm of the second
    assert (one.owner, one.op, one.call) in {("0", "add", 1), ("", "0", 1)}
    assert (two.owner, two.op, two.call) in {("1", "n3", 1), ("", "1", 1)}


def test_relocated_it_works_as_written_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(inverted(True), inverted(False), conv(), nn.ReLU()).eval()
    new = nmconv.convert(model, "3:1", relocate=True, keep="boundary")

    def by_hand(block, x, residual):
        y = block.n3(block.c3(block.n2(block.c2(block.n1(block.c1(x))))))
        return torch.relu(x + y if residual else y)

    x = torch.randn(2, 4, 8, 8)
    wanted = torch.relu(model[2](by_hand(model[1], by_hand(model[0], x, True), False)))
    assert torch.equal(new(x), wanted)
    assert list(new.state_dict()) == list(model.state_dict())


def test_relocate_moves_the_kept_one_whichever_it_is():
    model = nn.Sequential(inverted(True), conv(), nn.ReLU())
    assert actions(model, "3:1", keep="first") == ["move", "drop", "keep"]


def test_relocate_moves_nothing_where_the_last_conv_has_its_own():
    assert actions(post(3), "3:1") == ["drop", "drop", "keep"]
    assert actions(post(3), "3:1", keep="first") == ["keep", "drop", "drop"]


def test_relocate_also_where_the_unit_has_few_enough_already():
    """The issue's own example of "never onto logits", RetinaNet's head at 3:1, is a unit of two convs with one
    activation: few enough, and yet its activation would move if the rule on outputs did not forbid it."""
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.MaxPool2d(2), conv(), nn.ReLU())
    text = "1 move 0 A0 \n 5 keep 4 B0"
    expect(model, text, "2:1", relocate=True, convs=3)


@pytest.mark.parametrize("tail", ["output", "pool and linear", "norm", "also further", "in a dict"])
def test_relocate_never_onto_what_reaches_an_output_without_a_further_conv(tail):
    def forward(self, x):
        y = self.c3(self.a2(self.c2(self.a1(self.c1(x)))))
        if tail == "pool and linear":
            return self.fc(y.mean((2, 3)))
        if tail == "norm":
            return self.n(y)
        if tail == "also further":
            return y, self.a4(self.c4(y))
        return {"logits": y} if tail == "in a dict" else y

    more = {"a4": nn.ReLU(), "c4": conv()} if tail == "also further" else {}
    model = net(forward, **convs("c1 c2 c3"), **relus("a1 a2"), fc=nn.Linear(4, 2), **norms("n"), **more)
    assert actions(model, "3:1")[:2] == ["drop", "keep"]


def test_relocate_never_in_a_pre_activation_chain():
    model = nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.MaxPool2d(2), conv(), nn.ReLU())
    expect(model, "1 keep 2 A0 pre \n 3 drop 4 A0 pre \n 7 keep 6 B0 post", "2:1", relocate=True)
    expect(model, "1 drop 2 A0 pre \n 3 keep 4 A0 pre \n 7 keep 6 B0 post", "2:1", relocate=True, keep="first")


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v2", "timm/mobilenetv2_100"])
def test_relocate_mobilenet_v2_at_3_1(name):
    """Expand, depthwise, project, add, act: 17 units of three, and the last conv."""
    plan = nmconv.make_plan(zoo.build(name, "meta"), "3:1", relocate=True, keep="boundary")
    assert plan.counts.activations_before == 35
    assert plan.counts.activations_after == 18
    assert [site.action for site in plan.sites].count("move") == 17
    assert [site.action for site in plan.sites].count("drop") == 17
    assert plan.sites[-1].action == "keep"


def test_relocate_retinanet_head_stays():
    """[conv conv conv] [conv logits] at 3:1: the second unit would end on the logits."""
    plan = nmconv.make_plan(zoo.build("torchvision/retinanet_resnet50_fpn"), "3:1", relocate=True, keep="boundary")
    for head in ("classification_head", "regression_head"):
        sites = [site for site in plan.sites if f"{head}.conv" in site.name]
        assert [site.action for site in sites] == ["drop", "drop", "keep", "keep"]
        assert [site.unit for site in sites] == [0, 0, 0, 1]
