"""Ratios, patterns and options of a plan, and their errors."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import timm
import torch.nn.functional as F
from nets import convs, net
from plan_nets import CALLS, kept, label, refused, run_of, staged, untouched
from torch import nn
from zoo import models as zoo

import nmconv
from nmconv import (
    NmconvError,
    OptionError,
    PatternError,
    Plan,
    RatioError,
)

# --- ratio ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "text", "wanted"),
    [
        ("2:1", "2:1", "dKdKdK"),
        (" 3 : 2 ", "3:2", "dKKdKK"),
        ((3, 1), "3:1", "ddKddK"),
        ([4, 1], "4:1", "dddKdK"),
        (nmconv.Ratio(2, 1), "2:1", "dKdKdK"),
        ("1:1", "1:1", "KKKKKK"),
        ("2:2", "2:2", "KKKKKK"),
        ("100:1", "100:1", "dddddK"),
    ],
)
def test_ratios(ratio, text, wanted):
    plan = nmconv.make_plan(staged(), ratio, keep="boundary")
    assert (kept(plan), plan.counts.ratio_asked) == (wanted, text)
    after = wanted.count("K")
    assert plan.counts == nmconv.Counts(6, 6, after, text, f"{6 / after:.2f}:1")


BAD_RATIOS = [
    *("", "2", "2:", ":1", "2:1:1", "two:one", "2/1", "2-1", "-2:1", "2:-1", "2.0:1", "1:2", "0:1", "0:0", "2:0"),
    *("2:1\n3:1", "２:１", "2:1x", "2 1", b"2:1", b"21", bytearray(b"21")),
    *((1, 2), (2, 0), (0, 0), (-2, -2), (2.0, 1), (2, 1.0), (True, True), (2, True), (2,), (2, 1, 1), ("2", "1"), ()),
    *(2, 2.0, None, True, {2, 1}, object(), {"*": "1:2"}, {"*": 3}, {"*": "x"}, {"layer1": "2:1", "*": (1, 2)}),
    {"*": {"*": "2:1"}},
]


@pytest.mark.parametrize("ratio", BAD_RATIOS, ids=label)
def test_bad_ratios(ratio):
    refused(RatioError, staged(), ratio)
    with pytest.raises(ValueError):
        nmconv.make_plan(staged(), ratio, keep="boundary")


@pytest.mark.parametrize(("n", "m"), [(1, 2), (0, 0), (2, 0), (-1, -2)])
def test_a_ratio_out_of_range(n, m):
    with pytest.raises(RatioError, match=f"{n}:{m}"):
        nmconv.Ratio(n, m)


# --- patterns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "wanted"),
    [
        ({"*": "2:1"}, "dKdKdK"),
        ({"layer1": "2:1"}, "KdKKKK"),  # what no pattern matches is left alone
        ({"layer2": "3:1"}, "KKKddK"),
        ({"layer2.*": "3:1"}, "KKKddK"),
        ({"layer?": "3:1"}, "KddKdK"),  # a unit may lie across modules, and the tail is one of two
        ({"layer[1]": "2:1", "layer[!1]": (3, 1)}, "KdKddK"),
        ({"re:layer[12]": "3:1"}, "KddKdK"),
        ({r"re:layer\d\.[02]": "4:1"}, "KdddKK"),
        ({"layer1": None, "*": "2:1"}, "KKKdKK"),  # [stem] [layer1 alone] [layer2]
        ({"*": "2:1", "layer1": None}, "dKdKdK"),  # the first match wins
        ({"layer1.0": None, "layer1": "2:1", "*": "3:1"}, "KKKddK"),
        ({"layer1": "2:1", "layer2": "3:1"}, "KdKddK"),
        ({"layer1": "1:1", "layer2": "3:1", "*": None}, "KKKddK"),
        (OrderedDict([("stem", None), ("*", nmconv.Ratio(5, 1))]), "KddddK"),
        ({"*": None}, "KKKKKK"),
    ],
)
def test_mappings(ratio, wanted):
    assert kept(nmconv.make_plan(staged(), ratio, keep="boundary")) == wanted


def test_a_mapping_is_told_in_the_plan():
    plan = nmconv.make_plan(staged(), {"layer1": None, "layer2": "3:1", "*": (2, 1)}, keep="boundary")
    for part in ("layer1", "layer2", "3:1", "2:1"):
        assert part in plan.counts.ratio_asked
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"include": "layer1"}, "KdKKKK"),
        ({"include": ["layer1", "layer2"]}, "KdKdKK"),
        ({"include": ("stem", "layer1.0")}, "dKKKKK"),
        ({"exclude": "layer1"}, "KKKdKK"),
        ({"exclude": ["stem", "re:layer2.*"]}, "KdKKKK"),
        ({"include": "layer?", "exclude": "layer1"}, "KKKdKK"),
        ({"include": "*", "exclude": "*"}, "KKKKKK"),
        ({"exclude": []}, "dKdKdK"),
        ({"include": "layer1.1"}, "KKKKKK"),  # the name of an activation, too: a unit of one
        ({"include": iter(["layer1"])}, "KdKKKK"),
        ({"exclude": (name for name in ["layer1"])}, "KKKdKK"),
        ({"include": {"layer1"}}, "KdKKKK"),
    ],
    ids=label,
)
def test_include_and_exclude(options, wanted):
    assert kept(nmconv.make_plan(staged(), keep="boundary", **options)) == wanted


def test_options_are_told_in_the_plan_also_where_they_are_generators():
    plan = nmconv.make_plan(staged(), include=(name for name in ["layer1", "layer2"]), keep="first")
    told = dict(plan.options)
    assert told["keep"] == "first"
    assert "layer1" in told["include"] and "layer2" in told["include"]


def test_a_generator_of_patterns_survives_a_second_planning_round():
    """Where a method cannot be rewritten the plan is drawn up again."""

    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return x

    def block(self, x):
        self.count = x.shape  # stored by the forward: not to be rewritten
        return F.relu(self.c2(F.relu(self.c1(x))))

    def make():
        blocks = [net(block, **convs("c1 c2"), count=None), run_of(2)]
        return nn.Sequential(*blocks, net(forward))

    wanted = nmconv.make_plan(make(), include=["0", "1"], keep="boundary")
    assert nmconv.make_plan(make(), include=iter(["0", "1"]), keep="boundary").sites == wanted.sites


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": {"layer3": "2:1"}},
        {"ratio": {"layer1": "2:1", "nothing.*": None}},
        {"ratio": {"": "2:1"}},
        {"ratio": {"re:": "2:1"}},
        {"ratio": {"re:(": "2:1"}},
        {"ratio": {"re:layer": "2:1"}},  # the whole name, not its beginning
        {"ratio": {"LAYER1": "2:1"}},
        {"ratio": {3: "2:1"}},
        {"ratio": {None: "2:1"}},
        {"ratio": {("layer1",): "2:1"}},
        {"ratio": {"stage:1": "2:1"}},  # no feature_info
        {"include": "layer3"},
        {"include": ["layer1", "layer3"]},
        {"include": None},
        {"include": 3},
        {"include": [3]},
        {"include": b"layer1"},
        {"exclude": "layer3"},
        {"exclude": [None]},
        {"exclude": 1.5},
        {"exclude": "re:["},
        {"exclude": "stage:0"},
    ],
    ids=str,
)
def test_patterns_that_are_none_or_match_nothing(options):
    refused(PatternError, staged(), **options)


def test_an_empty_mapping_is_an_error():
    refused(NmconvError, staged(), {})


def test_a_pattern_that_matches_nothing_names_itself():
    with pytest.raises(PatternError, match="layre1"):
        nmconv.make_plan(staged(), {"layre1": "2:1", "*": None}, keep="boundary")


STAGES = ["conv1 act1", "layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize("number", range(5))
def test_stages_of_a_timm_model(number):
    model = zoo.build("timm/resnet18", "meta")
    plan = nmconv.make_plan(model, {f"stage:{number}": "2:1"}, keep="boundary")
    changed = {name for site in plan.changes for name in site.convs}
    assert all(name.split(".")[0] in STAGES[number].split() for name in changed)
    assert len(changed) == (0 if number == 0 else 2)
    assert (
        nmconv.make_plan(model, exclude=[f"stage:{at}" for at in range(5) if at != number], keep="boundary").sites
        == plan.sites
    )


def test_stages_mixed_with_other_patterns():
    model = zoo.build("timm/resnet50", "meta")
    plan = nmconv.make_plan(model, {"stage:4": None, "layer3.0": "1:1", "stage:3": "3:1", "*": "2:1"}, keep="boundary")
    changed = {name.rpartition(".")[0] for site in plan.changes for name in site.convs}
    assert not any(name.startswith("layer4") for name in changed)
    assert "layer3.0" not in changed
    per_block = [
        sum(block in name for site in plan.changes for name in site.convs) for block in ("layer3.1", "layer2.1")
    ]
    assert per_block == [2, 1]


@pytest.mark.parametrize("pattern", ["stage:5", "stage:99", "stage:", "stage:x", "stage:-1", "stage:1.0", "stage:²"])
def test_stages_that_are_none(pattern):
    model = timm.create_model("resnet10t")
    with pytest.raises(PatternError, match="stage"):
        nmconv.make_plan(model, {pattern: "2:1"}, keep="boundary")


@pytest.mark.parametrize("name", ["efficientnet_b0", "densenet121", "regnetx_002", "repvgg_a0", "dla34"])
def test_stages_do_not_overlap_and_leave_only_the_head(name):
    model = zoo.build(f"timm/{name}", "meta")
    count = len(model.feature_info.info if hasattr(model.feature_info, "info") else model.feature_info)
    seen: list[str] = []
    for number in range(count):
        try:
            plan = nmconv.make_plan(model, {f"stage:{number}": "100:1"}, keep="boundary")
        except PatternError as error:
            assert "no convolution" in str(error)
            continue
        inside = [site.id for site in plan.sites if site.chain is not None and site.unit is not None]
        assert not set(inside) & set(seen)
        seen += inside
    sites = [site.id for site in nmconv.make_plan(model, keep="boundary").sites if site.chain is not None]
    assert [site for site in sites if site in seen] == seen  # in the order of execution
    assert len(seen) >= len(sites) - 2


def test_a_stage_whose_end_is_no_conv_is_what_runs_up_to_it():
    """DenseNet's last feature is the norm behind the last block: stage 4 is that block."""
    model = zoo.build("timm/densenet121", "meta")
    plan = nmconv.make_plan(model, {"stage:4": "2:1"}, keep="boundary")
    changed = {name for site in plan.changes for name in site.convs}
    assert len(changed) == 16
    assert all(name.startswith("features.denseblock4.") for name in changed)


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["best", "", "LAST", None, 1, True, ["last"], b"last", nn.Identity], ids=str)
def test_an_unknown_keep(keep):
    refused(OptionError, staged(), keep=keep)


@pytest.mark.parametrize(
    "answer", [[0, 1], [2], [-1], [True], [0.0], ["0"], None, 0, [None], "0", [[0]], [0, 1, 2]], ids=label
)
def test_a_keep_function_with_a_bad_answer(answer):
    refused(OptionError, staged(), keep=lambda unit: answer)


def test_what_a_keep_function_raises_comes_through_and_nothing_is_touched():
    def broken(unit):
        raise ZeroDivisionError

    model = staged()
    before = untouched(model)
    for call in CALLS.values():
        with pytest.raises(ZeroDivisionError):
            call(model, keep=broken)
    assert untouched(model) == before


def test_options_are_by_keyword():
    with pytest.raises(TypeError):
        nmconv.make_plan(staged(), "2:1", "last", keep="boundary")
