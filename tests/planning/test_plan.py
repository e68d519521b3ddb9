"""The plan as data and the calls around it: ratios, patterns, JSON, edits, fingerprints, and every error."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
import re
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import conv, convs, expect, net, norms, relus, rows
from torch import nn
from zoo import models as zoo

import nmconv
from nmconv import (
    AlreadyConvertedError,
    ModelTypeError,
    NmconvError,
    NoEffectWarning,
    NoSitesError,
    OptionError,
    PatternError,
    Plan,
    PlanError,
    RatioError,
)
from nmconv.finding import structure_of
from nmconv.flow import record_model


def label(value: Any) -> str | None:
    """A parameter's id without addresses in it: every worker must give it the same."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def run_of(count: int) -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(count) for part in (conv(), nn.ReLU())))


def staged() -> nn.Sequential:
    """One chain of six convs in three places: stem.0, layer1.0, .2, layer2.0, .2, .4."""
    return nn.Sequential(OrderedDict(stem=run_of(1), layer1=run_of(2), layer2=run_of(3)))


def kept(plan: Plan) -> str:
    """One letter per site: K, d, M, s."""
    letters = {"keep": "K", "drop": "d", "move": "M", "skip": "s"}
    return "".join(letters[site.action] for site in plan.sites)


def untouched(model: nn.Module) -> Any:
    """Everything about a model that a call could change: classes, attributes, containers, tensors, random states."""

    def seen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return id(value), value._version, value.requires_grad, value.detach().clone().flatten().tolist()
        if isinstance(value, dict):
            return type(value), [(key, id(part), seen(part)) for key, part in value.items()]
        if isinstance(value, (list, tuple, set)):
            return type(value), [(id(part), seen(part)) for part in value]
        return id(value) if isinstance(value, nn.Module) else repr(value)

    return (
        [(name, id(module), type(module), seen(module.__dict__)) for name, module in model.named_modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.is_grad_enabled(),
        nn.Module.__call__,
        nn.Module.__getattr__,
        "training" in vars(nn.Module),
    )


CALLS = {
    "make_plan": nmconv.make_plan,
    "convert": nmconv.convert,
    "convert in-place": lambda *args, **options: nmconv.convert(*args, inplace=True, **options),
}


def refused(error: type[Exception], model: nn.Module, *args: Any, match: str | None = None, **options: Any) -> None:
    """All three calls raise the error and leave the model as it was."""
    before = untouched(model)
    for call in CALLS.values():
        with pytest.raises(error, match=match) as caught:
            call(model, *args, **options)
        assert isinstance(caught.value, NmconvError)
        assert str(caught.value)
        assert untouched(model) == before


# --- ratio ------------------------------------------------------------------------------------------------------------


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


# --- patterns ---------------------------------------------------------------------------------------------------------


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


# --- options ----------------------------------------------------------------------------------------------------------


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


# --- models that are none ---------------------------------------------------------------------------------------------


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(staged())


def jit_traced() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(staged(), torch.zeros(1, 4, 8, 8))


def compiled_in_place() -> nn.Module:
    model = staged()
    model.compile()
    return model


NO_MODELS = {
    "None": lambda: None,
    "a string": lambda: "resnet18",
    "a function": lambda: F.relu,
    "a class": lambda: nn.ReLU,
    "a list": lambda: [conv(), nn.ReLU()],
    "a state dict": lambda: staged().state_dict(),
    "a tensor": lambda: torch.zeros(1),
    "DataParallel": lambda: nn.DataParallel(staged()),
    "compiled": lambda: torch.compile(staged()),
    "compiled in place": compiled_in_place,
    "scripted": scripted,
    "traced": jit_traced,
    "wrapped inside": lambda: nn.Sequential(torch.compile(staged())),
}
HINTS = {"DataParallel": "module", "compiled": "_orig_mod", "compiled in place": "compile", "scripted": "script"}


@pytest.mark.parametrize("what", NO_MODELS)
def test_what_is_no_model(what):
    model = NO_MODELS[what]()
    plan = nmconv.make_plan(staged(), keep="boundary")
    for call in (*CALLS.values(), lambda model: nmconv.apply_plan(model, plan)):
        with pytest.raises(ModelTypeError, match=HINTS.get(what)) as caught:
            call(model)
        assert isinstance(caught.value, TypeError)


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_ddp_is_to_be_unwrapped(process_group):
    model = nn.parallel.DistributedDataParallel(staged())
    for call in CALLS.values():
        with pytest.raises(ModelTypeError, match="module"):
            call(model)


def test_get_plan():
    assert nmconv.get_plan(staged()) is None
    model = nmconv.convert(staged(), keep="boundary")
    assert nmconv.get_plan(model) == nmconv.make_plan(staged(), keep="boundary")
    assert nmconv.get_plan(copy.deepcopy(model)) == nmconv.get_plan(model)
    with pytest.raises(ModelTypeError):
        nmconv.get_plan(3)


# --- no sites, no effect ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(),
        nn.Identity(),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Sequential(conv(), nn.BatchNorm2d(4), conv()),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        nn.Sequential(conv(), nn.Sigmoid(), conv(), nn.Tanh()),
        net(lambda self, x: self.c(x) * torch.sigmoid(self.g(F.relu(self.h(x)))), **convs("c g h")),
    ],
    ids=["empty", "identity", "a conv", "a relu", "conv norm conv", "linear", "not on the list", "gates alone"],
)
def test_no_sites(model):
    refused(NoSitesError, model)


def test_no_effect_warns_and_returns_a_model():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), conv(), nn.ReLU())
    with pytest.warns(NoEffectWarning):
        new = nmconv.convert(model, keep="boundary")
    assert new is not model
    with pytest.warns(NoEffectWarning):
        assert nmconv.convert(model, inplace=True, keep="boundary") is model
    with pytest.warns(NoEffectWarning):
        nmconv.apply_plan(staged(), nmconv.make_plan(staged(), "1:1"))
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(new(x), model(x))


@pytest.mark.parametrize("patterns", [{"include": []}, {"exclude": "*"}, {"ratio": {"*": None}}])
def test_no_effect_of_patterns(patterns):
    with pytest.warns(NoEffectWarning, match="the patterns given leave everything alone"):
        nmconv.convert(staged(), **patterns)


@pytest.mark.parametrize("option", ["relocate", "linear", "hoist_padding", "witness", "inplace", "gradual"])
def test_options_that_are_on_or_off_are_no_text(option):
    with pytest.raises(OptionError, match=f"{option}='no': give True or False"):
        nmconv.convert(staged(), **{option: "no"})


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "torchvision/shufflenet_v2_x1_0", "timm/ghostnet_100"])
def test_no_effect_in_the_zoo(name):
    model = zoo.build(name, "meta")
    with pytest.warns(NoEffectWarning):
        nmconv.convert(model, inplace=True, keep="boundary")


def test_a_site_that_always_stays_is_a_site():
    """One activation that serves two surroundings is all there is: nothing changes, but there is a site."""

    def forward(self, x):
        return self.block(F.max_pool2d(x, 2)), self.c1(self.block(x)) + x

    model = net(forward, **convs("c1"), block=net(lambda self, x: self.c(self.a(x)), c=conv(), a=nn.ReLU()))
    plan = nmconv.make_plan(model, "2:1", keep="boundary")
    assert plan.counts.activations_before == 1
    with pytest.warns(NoEffectWarning):
        nmconv.convert(model, keep="boundary")


# --- converted already ------------------------------------------------------------------------------------------------


def test_a_converted_model_is_not_converted_again():
    """It would count from what the first conversion has left; a plan counts from the original."""
    model = nmconv.convert(staged(), keep="boundary")
    before = untouched(model)
    for ratio in ("2:1", "1:1"):
        for inplace in (False, True):
            with pytest.raises(AlreadyConvertedError, match=r"get_plan.*apply_plan"):
                nmconv.convert(model, ratio, inplace=inplace, keep="boundary")
    assert untouched(model) == before
    assert nmconv.make_plan(model, "3:1", keep="boundary") == nmconv.make_plan(staged(), "3:1", keep="boundary")


def test_a_model_with_a_converted_part_is_not_converted():
    refused(
        AlreadyConvertedError, nn.Sequential(nmconv.convert(staged(), keep="boundary"), conv(), nn.ReLU()), match="'0'"
    )


def test_copies_and_pickles_of_converted_models_are_converted():
    model = nmconv.convert(staged(), keep="boundary")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AlreadyConvertedError):
            nmconv.convert(again, keep="boundary")


# --- the plan as data -------------------------------------------------------------------------------------------------


def zoo_of_plans() -> dict[str, Plan]:
    def middle(unit):
        return [0]

    def aux(self, x):
        x = self.relu(self.c1(x))
        side = self.relu(self.c3(x)) if self.training else x
        return self.relu(self.c2(x)), side

    def broken(self, x):
        if self.training:
            raise ValueError("no targets")
        return -x

    # three convs, two activations, then one more conv: something to move
    to_move = nn.Sequential(run_of(2), conv(), nn.MaxPool2d(2), conv(), nn.ReLU())
    return {
        "plain": nmconv.make_plan(staged(), keep="boundary"),
        "mapping": nmconv.make_plan(staged(), {"layer1": None, "*": "3:1"}, keep="boundary"),
        "patterns": nmconv.make_plan(staged(), include=["layer1", "layer2"], exclude="layer2.0", keep="boundary"),
        "function": nmconv.make_plan(staged(), keep=middle),
        "moved": nmconv.make_plan(to_move, "3:1", relocate=True, keep="boundary"),
        "functional": nmconv.make_plan(
            net(lambda self, x: F.relu(self.c2(F.relu(self.c1(x)))), **convs("c1 c2")), keep="boundary"
        ),
        "train": nmconv.make_plan(net(aux, **convs("c1 c2 c3"), relu=nn.ReLU()), keep="boundary"),
        "untraced": nmconv.make_plan(nn.Sequential(staged(), net(broken), run_of(2)), keep="boundary"),
        "resnet": nmconv.make_plan(zoo.build("torchvision/resnet18", "meta"), keep="boundary"),
        "edited": nmconv.make_plan(staged(), keep="boundary").edit({"stem.1#1": "keep"}),
    }


PLANS = zoo_of_plans()


@pytest.mark.parametrize("name", PLANS)
def test_json_round_trip(name):
    plan = PLANS[name]
    for text in (plan.to_json(), json.dumps(json.loads(plan.to_json()), sort_keys=True)):
        again = Plan.from_json(text)
        assert again == plan
        assert hash(again) == hash(plan)
        assert again.to_json() == plan.to_json()
        assert str(again) == str(plan)
        assert again.counts == plan.counts


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_plain_frozen_data(name):
    plan = PLANS[name]

    def walk(value):
        if dataclasses.is_dataclass(value):
            assert type(value).__module__.startswith("nmconv.planning")
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, dataclasses.fields(value)[0].name, None)
            value = tuple(getattr(value, field.name) for field in dataclasses.fields(value) if field.compare)
        if isinstance(value, tuple):
            for part in value:
                walk(part)
        else:
            assert value is None or type(value) in (str, int, bool), value

    walk(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan
    assert len({site.id for site in plan.sites}) == len(plan.sites)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_reads_as_a_table(name):
    plan = PLANS[name]
    lines = str(plan).splitlines()
    assert plan.model in lines[0] and plan.counts.ratio_asked in lines[0] and plan.counts.ratio_reached in lines[0]
    for site in plan.sites:
        line = next(line for line in lines if line.split()[:1] == [site.id])
        assert site.action in line and site.reason in line and site.kind in line
    for part in plan.untraced:
        assert part.name in str(plan) and part.hint in str(plan)


def test_what_moved_counts_as_kept():
    plan = PLANS["moved"]
    assert kept(plan) == "dMK"
    assert plan.counts.activations_after == 2


def test_json_says_its_version_and_another_is_refused():
    data = json.loads(PLANS["plain"].to_json())
    version = data["nmconv_plan"]
    for other in (version + 1, 0, -1, None, "1", "x", [version], {}):
        with pytest.raises(PlanError, match="version"):
            Plan.from_json(json.dumps({**data, "nmconv_plan": other}))
    del data["nmconv_plan"]
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"plan"', "{}", '{"nmconv_plan": 1}', "\x00", "plan", None, 3, b"\xff", ["{}"]],
    ids=label,
)
def test_what_is_no_json_of_a_plan(text):
    with pytest.raises(PlanError):
        Plan.from_json(text)


WRONG = (None, 7, -1.5, True, "nonsense", [], ["x"], {}, {"x": 1}, [None], [[1]])


def _fits(field: str, good: Any, wrong: Any) -> bool:
    """Whether the wrong value is, by its type, one that the field could have."""
    if field in ("model", "fingerprint", "ratio", "name", "kind", "role", "reason", "hint"):
        return isinstance(wrong, str)
    if field in ("chain", "unit", "train_call"):
        return wrong is None or type(wrong) is int
    if field == "convs" and isinstance(good, list):
        return isinstance(wrong, list) and all(isinstance(part, str) for part in wrong)
    if field == "convs":
        return type(wrong) is int
    if field == "call":
        return wrong is None
    if field == "behind":
        return isinstance(wrong, str) and bool(wrong)
    return field in ("sites", "untraced", "options") and wrong == []


def _damaged() -> list[tuple[str, str, Any]]:
    moved, untraced = (json.loads(PLANS[name].to_json()) for name in ("moved", "untraced"))
    found = [("plan", key, value) for key in moved if key != "nmconv_plan" for value in WRONG]
    found += [("site", key, value) for key in moved["sites"][1] for value in WRONG]
    found += [("call", key, value) for key in ("args", "kwargs") for value in WRONG]
    found += [("tensor", key, value) for key in ("shape", "dtype") for value in WRONG]
    found += [("untraced", key, value) for key in untraced["untraced"][0] for value in WRONG]
    return found


def _part(data: dict[str, Any], where: str) -> dict[str, Any]:
    return {
        "plan": lambda: data,
        "site": lambda: data["sites"][1],
        "call": lambda: data["call"],
        "tensor": lambda: data["call"]["args"][0],
        "untraced": lambda: data["untraced"][0],
    }[where]()


def _fits_a_call(field: str, wrong: Any) -> bool:
    """The same within the call: arguments are lists of anything plain, and a dtype is looked up when it is needed."""
    if field == "args":
        return isinstance(wrong, list)
    return (
        (field == "kwargs" and wrong in ({}, {"x": 1}))
        or (field == "shape" and wrong == [])
        or (field == "dtype" and isinstance(wrong, str))
    )


def test_damaged_plans_are_refused():
    """Every field in turn is given values of other types: each is refused, by the library's own error."""
    accepted, crashed = [], []
    for where, field, value in _damaged():
        data = json.loads(PLANS["untraced" if where == "untraced" else "moved"].to_json())
        part = _part(data, where)
        inside = where in ("call", "tensor")
        if (_fits_a_call(field, value) if inside else _fits(field, part[field], value)) or part.get(field) == value:
            continue
        part[field] = value
        try:
            Plan.from_json(json.dumps(data))
            accepted.append((where, field, value))
        except PlanError:
            pass
        except Exception as error:
            crashed.append((where, field, value, repr(error)))
    assert not crashed
    assert not accepted


def test_damaged_plans_lack_nothing_and_have_nothing_more():
    usual = {"convs", "role", "chain", "unit", "call", "untraced"}  # what a site or a plan need not have
    for where in ("plan", "site", "untraced"):
        text = PLANS["untraced" if where == "untraced" else "moved"].to_json()
        for key in _part(json.loads(text), where):
            data = json.loads(text)
            del _part(data, where)[key]
            if key in usual and (where, key) != ("plan", "convs"):
                continue
            with pytest.raises(PlanError):
                Plan.from_json(json.dumps(data))
        data = json.loads(text)
        _part(data, where)["more"] = 1
        with pytest.raises(PlanError):
            Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("action", value) for value in ("DROP", "", "move")),
        *(("site", value) for value in ("stem.1", "stem.1#x", "")),
        ("modes", "all"),
        ("behind", "stem.0"),
        ("name", "stem.1"),
        ("owner", "stem"),
        ("locked", "it is so"),
    ],
)
def test_words_that_no_plan_has(field, value):
    data = json.loads(PLANS["plain"].to_json())
    assert data["sites"][0]["action"] == "drop"
    data["sites"][0][field] = value
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "call",
    [
        {"args": [{"shape": [10**12]}]},
        {"args": [{"shape": [1] * 100}]},
        {"args": [{"shape": [1.5]}]},
        {"args": [{"shape": [1], "more": 1}]},
        {"args": [{"tuple": 3}]},
        {"args": [{"list": []}]},
        {"args": [10**12]},
        {"args": [[[[[[[[[[[[1]]]]]]]]]]]]},
        {"args": [0] * 100},
        {"args": [], "more": 1},
    ],
    ids=label,
)
def test_calls_that_no_model_has(call):
    data = json.loads(PLANS["plain"].to_json())
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps({**data, "call": call}))


def test_a_call_says_what_it_was():
    """What can be said of the arguments comes back; the model's own dtype is no part of it."""

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.r, self.b, self.s = conv(), nn.ReLU(), conv(), nn.ReLU()

        def forward(self, x, pair, options, scale=1.0, mode="max", flag=None):
            x = x + pair[1].to(x.dtype)[:, None, None, None]
            return self.s(self.b(self.r(self.a(x)))) * options["size"][0] * scale

    given = {"x": torch.zeros(2, 4, 8, 8), "pair": (3, torch.zeros(2, dtype=torch.int64)), "options": {"size": [1, 2]}}
    given |= {"scale": 2.0, "mode": "min", "flag": True}
    plan = nmconv.make_plan(Called(), "2:1", example_inputs=given, keep="boundary")
    again = Plan.from_json(plan.to_json())
    assert again.call == plan.call and again == plan
    assert json.loads(plan.to_json())["call"]["kwargs"]["x"] == {"shape": [2, 4, 8, 8]}
    assert json.loads(plan.to_json())["call"]["kwargs"]["pair"]["tuple"][1] == {"shape": [2], "dtype": "int64"}
    assert nmconv.get_plan(nmconv.apply_plan(Called(), again)) == plan  # no guess could call it
    assert nmconv.get_plan(nmconv.apply_plan(Called().double(), again, witness=False)) == plan
    more = dataclasses.replace(plan, call=None)
    assert more == plan and hash(more) == hash(plan)
    with pytest.raises(nmconv.OptionError):
        nmconv.apply_plan(Called(), more)
    assert nmconv.get_plan(nmconv.apply_plan(Called(), more, example_inputs=given)) == plan


def test_example_inputs_win_over_the_call():
    model = staged()
    plan = nmconv.make_plan(model, keep="boundary")
    strange = dataclasses.replace(plan, call=nmconv.planning.Signature((nmconv.planning.TensorSpec((1, 9, 8, 8)),), {}))
    with pytest.raises(PlanError, match=r"9, 8, 8.*the one that the plan states"):
        nmconv.apply_plan(model, strange)
    assert nmconv.get_plan(nmconv.apply_plan(model, strange, example_inputs=torch.zeros(1, 4, 8, 8))) == plan
    odd = dataclasses.replace(
        plan, call=nmconv.planning.Signature((nmconv.planning.TensorSpec((1, 4, 8, 8), "no"),), {})
    )
    with pytest.raises(PlanError, match="'no', which torch does not have"):
        nmconv.apply_plan(model, odd)


def test_a_page_that_people_read():
    text = nmconv.make_plan(timm.create_model("resnet18"), "2:1", keep="boundary").to_json()
    assert len(text) < 6000
    assert len([line for line in text.splitlines() if line.startswith('  {"site": ')]) == 17
    edited = text.replace(
        '{"site": "layer1.0.act1#1", "action": "drop"', '{"site": "layer1.0.act1#1", "action": "keep"'
    )
    assert edited != text
    converted = nmconv.apply_plan(timm.create_model("resnet18"), Plan.from_json(edited))
    assert isinstance(converted.layer1[0].act1, nn.ReLU) and isinstance(converted.layer1[1].act1, nn.Identity)


def test_a_plan_of_an_older_version_names_both_versions_and_the_way_out():
    old = json.dumps({"nmconv_plan": 4, "model": "Net"})
    with pytest.raises(PlanError, match=r"version 4.*reads 5.*nmconv\.make_plan"):
        Plan.from_json(old)


def test_a_site_twice_is_damage():
    data = json.loads(PLANS["plain"].to_json())
    data["sites"].append(data["sites"][0])
    with pytest.raises(PlanError, match="twice"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "position", "changes"),
    [
        ("plain", 0, {"site": "nowhere.relu#1"}),
        ("plain", 0, {"site": "stem.0#1"}),
        ("plain", 0, {"site": "#1"}),
        ("plain", 0, {"site": "stem.1#1@nowhere"}),
        ("plain", 0, {"site": "stem.1#7"}),
        ("plain", 0, {"site": "stem.1#1(train)"}),
        ("functional", 0, {"site": "nowhere:relu#1"}),
        ("functional", 0, {"site": ":relu#7"}),
        ("functional", 0, {"site": ":silu#1"}),
        ("functional", 0, {"site": ":__class__#1"}),
        ("moved", 1, {"behind": "nowhere"}),
        ("moved", 1, {"behind": "0.0"}),
        ("moved", 1, {"behind": "__class__"}),
    ],
    ids=str,
)
def test_a_plan_that_names_what_the_model_has_not_changes_nothing(name, position, changes):
    """The fingerprint is right, the content is not: an error of the library's own, and the model as it was."""
    models = {
        "plain": staged(),
        "functional": net(lambda self, x: F.relu(self.c2(F.relu(self.c1(x)))), **convs("c1 c2")),
        "moved": nn.Sequential(run_of(2), conv(), nn.MaxPool2d(2), conv(), nn.ReLU()),
    }
    model = models[name]
    data = json.loads(PLANS[name].to_json())
    data["sites"][position].update(changes)
    before = untouched(model)
    for inplace in (False, True):
        with pytest.raises(NmconvError):
            nmconv.apply_plan(model, Plan.from_json(json.dumps(data)), inplace=inplace)
        assert untouched(model) == before


# --- edit -------------------------------------------------------------------------------------------------------------


def test_edit():
    plan = nmconv.make_plan(staged(), keep="boundary")
    assert kept(plan) == "dKdKdK"
    new = plan.edit({"stem.1#1": "keep", plan.sites[1]: "drop"})
    assert kept(new) == "KddKdK"
    assert kept(plan) == "dKdKdK"
    assert new.counts.activations_after == 3
    assert (new.fingerprint, new.ratio, new.options) == (plan.fingerprint, plan.ratio, plan.options)
    assert "hand" in new.sites[0].reason
    assert new.sites[2:] == plan.sites[2:]
    converted = nmconv.apply_plan(staged(), new)
    assert [type(part[1]).__name__ for part in (converted.stem, converted.layer1)] != ["ReLU", "ReLU"]
    assert nmconv.get_plan(converted) == new


def test_edit_may_leave_a_unit_with_none_or_all():
    plan = nmconv.make_plan(staged(), keep="boundary")
    none = plan.edit(dict.fromkeys(plan.sites, "drop"))
    assert none.counts == nmconv.Counts(6, 6, 0, "2:1", "6:0")
    x = torch.randn(1, 4, 8, 8)
    model = staged()
    linear = nmconv.apply_plan(model, none)
    y = x
    for part in (model.stem, model.layer1, model.layer2):
        for layer in part:
            y = layer(y) if isinstance(layer, nn.Conv2d) else y
    assert torch.equal(linear(x), y)
    everything = plan.edit({site.id: "keep" for site in plan.sites})
    assert everything.counts.activations_after == 6
    with pytest.warns(NoEffectWarning):
        nmconv.apply_plan(staged(), everything)


def test_edits_that_are_nearly_right():
    plan = nmconv.make_plan(staged(), keep="boundary")
    site = plan.sites[0].id
    with pytest.raises(PlanError, match="map sites to actions"):
        plan.edit([(site, "keep")])
    with pytest.raises(PlanError, match=f"did you mean .*{site}"):
        plan.edit({site[:-1] + "7": "keep"})


def test_edit_of_a_moved_site_puts_it_back():
    plan = PLANS["moved"]
    site = plan.sites[1]
    assert site.action == "move"
    for action in ("keep", "drop"):
        new = plan.edit({site: action}).sites[1]
        assert (new.action, new.behind) == (action, "")


@pytest.mark.parametrize(
    "actions",
    [
        {"stem.1": "keep"},
        {"stem.1#2": "keep"},
        {"nowhere#1": "drop"},
        {"": "drop"},
        {3: "drop"},
        {None: "drop"},
        {"stem.1#1": "skip"},
        {"stem.1#1": "move"},
        {"stem.1#1": "Keep"},
        {"stem.1#1": None},
        {"stem.1#1": True},
        {"stem.1#1": "drop", "nowhere#1": "drop"},
    ],
    ids=str,
)
def test_edits_that_are_none(actions):
    plan = nmconv.make_plan(staged(), keep="boundary")
    with pytest.raises(PlanError):
        plan.edit(actions)


def test_edit_names_near_ids():
    with pytest.raises(PlanError, match=r"stem\.1#1"):
        nmconv.make_plan(staged(), keep="boundary").edit({"stem.1": "keep"})


def test_edit_of_a_site_that_is_skipped():
    model = nn.Sequential(run_of(2), nn.Flatten(), nn.Linear(4, 4), nn.ReLU())
    plan = nmconv.make_plan(model, example_inputs=torch.zeros(2, 4, 1, 1), keep="boundary")
    for action in ("keep", "drop"):
        with pytest.raises(PlanError, match="linear"):
            plan.edit({"3#1": action})


def test_edit_of_a_site_that_is_locked():
    """A method that stores attributes is not rewritten: what it calls cannot go, and the plan says so."""

    def forward(self, x):
        self.seen = x.shape
        return F.relu(self.c2(F.relu(self.c1(x))))

    plan = nmconv.make_plan(nn.Sequential(net(forward, **convs("c1 c2"), seen=None), run_of(2)), keep="boundary")
    site = plan.sites[0]
    assert site.locked and site.action == "keep"
    with pytest.raises(PlanError, match="cannot be dropped"):
        plan.edit({site: "drop"})
    assert plan.edit({site: "keep"}).sites[0].action == "keep"


def test_an_edited_plan_is_checked_like_any_other():
    plan = nmconv.make_plan(staged(), keep="boundary").edit({"stem.1#1": "keep"})
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError):
        nmconv.apply_plan(run_of(3), plan)


# --- a plan and other models ------------------------------------------------------------------------------------------


def swapped_kind() -> nn.Module:
    model = staged()
    model.layer1[1] = nn.SiLU()
    return model


def wider() -> nn.Module:
    model = staged()
    model.layer1[0], model.layer1[2] = conv(4, 8), conv(8, 4)
    return model


def renamed() -> nn.Module:
    return nn.Sequential(OrderedDict(stem=run_of(1), layer1=run_of(2), layer3=run_of(3)))


@pytest.mark.parametrize("other", [swapped_kind, wider, renamed, lambda: run_of(6), lambda: nn.Sequential(staged())])
def test_a_plan_of_another_model(other):
    plan = nmconv.make_plan(staged(), keep="boundary")
    model = other()
    before = untouched(model)
    for inplace in (False, True):
        with pytest.raises(PlanError, match=r"fingerprint.*make a plan for this model"):
            nmconv.apply_plan(model, plan, inplace=inplace)
        assert untouched(model) == before


def _wired(forward):
    return net(forward, **convs("c1 c2 c3"), **norms("n"))


WIRINGS = {
    "no activation": lambda self, x: self.c3(self.c2(self.c1(x))),
    "another function": lambda self, x: F.silu(self.c3(F.silu(self.c2(F.silu(self.c1(x)))))),
    "another order": lambda self, x: F.relu(self.c1(F.relu(self.c2(F.relu(self.c3(x)))))),
    "a residual": lambda self, x: F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(x)) + x)))),
    "one more before": lambda self, x: F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(F.relu(x))))))),
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_plan_of_a_model_with_the_same_children_but_another_forward(wiring):
    """applying it to another model is a clear error: here the modules are alike, and only what is called differs."""
    plan = nmconv.make_plan(
        _wired(lambda self, x: F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(x))))))), "3:1", keep="boundary"
    )
    model = _wired(WIRINGS[wiring])
    before = untouched(model)
    with pytest.raises(PlanError):
        nmconv.apply_plan(model, plan, inplace=True)
    assert untouched(model) == before


def test_a_plan_of_a_model_that_overwrites_what_the_other_copies():
    """How an activation is called is found anew in each model, and is no part of a plan."""
    plain = _wired(lambda self, x: F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(x)))))))
    other = _wired(lambda self, x: F.relu_(self.c3(F.relu_(self.c2(F.relu_(self.c1(x)))))))
    plan = nmconv.make_plan(plain, "3:1", keep="boundary")
    assert nmconv.make_plan(other, "3:1", keep="boundary") == plan
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(nmconv.apply_plan(other, plan).eval()(x), nmconv.apply_plan(plain, plan).eval()(x))


@pytest.mark.parametrize(
    "plan", [None, "2:1", {}, 3, PLANS["plain"].to_json(), Plan], ids=["None", "ratio", "dict", "int", "json", "class"]
)
def test_what_is_no_plan(plan):
    model = staged()
    before = untouched(model)
    with pytest.raises(PlanError):
        nmconv.apply_plan(model, plan, inplace=True)
    assert untouched(model) == before


def test_a_plan_of_resnet18_is_none_of_timms():
    plan = PLANS["resnet"]
    with pytest.raises(PlanError):
        nmconv.apply_plan(zoo.build("timm/resnet18", "meta"), plan)


# --- the fingerprint --------------------------------------------------------------------------------------------------


def variants() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    weight_normed, hooked = staged(), staged()
    nn.utils.parametrizations.weight_norm(weight_normed.layer1[0])
    hooked.layer1.register_forward_hook(lambda *_: None)
    return {
        "weights": staged(),
        "eval": staged().eval(),
        "half": staged().half(),
        "bfloat16": staged().bfloat16(),
        "double": staged().double(),
        "meta": staged().to("meta"),
        "frozen": staged().requires_grad_(False),
        "channels_last": staged().to(memory_format=torch.channels_last),
        "weight norm": weight_normed,
        "hooks": hooked,
        "copy": copy.deepcopy(staged()),
    }


@pytest.mark.parametrize("variant", variants())
def test_the_fingerprint_ignores(variant):
    model, plan = variants()[variant], nmconv.make_plan(staged(), keep="boundary")
    assert nmconv.make_plan(model, keep="boundary").fingerprint == plan.fingerprint
    assert nmconv.get_plan(nmconv.apply_plan(model, plan)) == plan
    assert nmconv.get_plan(nmconv.apply_plan(staged(), nmconv.make_plan(model, keep="boundary"))).sites == plan.sites


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "resnetv2_50", "densenet121", "vgg11_bn"])
def test_the_fingerprint_ignores_timms_classifier(name):
    plan = nmconv.make_plan(zoo.build(f"timm/{name}", "meta"), keep="boundary")
    with torch.device("meta"):
        other = timm.create_model(name, num_classes=7)
        none = timm.create_model(name, num_classes=0)
        reset = timm.create_model(name)
        reset.reset_classifier(11)
    for model in (other, none, reset):
        new = nmconv.make_plan(model, keep="boundary")
        assert new.fingerprint == plan.fingerprint
        assert nmconv.get_plan(nmconv.apply_plan(model, plan, inplace=True)) == plan


@pytest.mark.parametrize(
    "name", ["resnet18", "squeezenet1_1", "mobilenet_v2", "vgg11_bn", "fcn_resnet50", "deeplabv3_resnet50"]
)
def test_the_fingerprint_ignores_torchvisions_classifier(name):
    """In squeezenet and in the segmentation heads the classifier is a conv."""
    import torchvision

    options = {"weights": None} | ({"weights_backbone": None} if "resnet50" in name else {})
    with torch.device("meta"):
        one, two = (torchvision.models.get_model(name, num_classes=count, **options) for count in (5, 9))
    one, two = nmconv.make_plan(one, keep="boundary"), nmconv.make_plan(two, keep="boundary")
    assert one.fingerprint == two.fingerprint


def test_a_reset_classifier_after_conversion_keeps_the_conversion():
    model = nmconv.convert(timm.create_model("resnet10t"), keep="boundary")
    plan = nmconv.get_plan(model)
    model.reset_classifier(3)
    assert nmconv.get_plan(model) == plan
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


# --- what could not be traced -----------------------------------------------------------------------------------------


def failing_in_train_mode(self, x):
    if self.training:
        raise ValueError("no targets")
    return F.relu(self.c1(x))


def test_parts_that_do_not_run_in_a_mode_are_named_with_what_to_do():
    model = nn.Sequential(run_of(2), net(failing_in_train_mode, **convs("c1")), run_of(2))
    plan = nmconv.make_plan(model, keep="boundary")
    (part,) = plan.untraced
    assert part.name == "1" and "train mode (ValueError: no targets)" in part.reason and "example_inputs" in part.hint
    assert "1: it does not run in train mode" in str(plan)
    # what runs is planned all the same, and what cannot be rewritten for both modes stays
    assert sorted(row[:3] for row in rows(plan)) == [
        ("0.1#1", "drop", "0.0"),
        ("0.3#1", "keep", "0.2"),
        ("1:relu#1", "keep", "1.c1"),
        ("2.1#1", "keep", "2.0"),
        ("2.3#1", "keep", "2.2"),
    ]


def test_example_inputs_reach_what_shapes_decide():
    def forward(self, x, context):
        if context.shape[1] == 4:
            x = x + context
        x = x * self.g(context)
        return self.a2(self.c2(self.a1(self.c1(x))))

    model = net(forward, **convs("c1 c2 g"), **relus("a1 a2"))
    text = "a1 drop c1 A0 \n a2 keep c2 A0"
    x, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 1, 1)
    plan = expect(model, text, example_inputs=(x, context), convs=2)
    assert nmconv.make_plan(model, example_inputs={"x": x, "context": context}, keep="boundary").sites == plan.sites
    with pytest.raises(OptionError, match="example_inputs"):
        nmconv.make_plan(model, example_inputs=(x, torch.zeros(1, 5, 1, 1)), keep="boundary")


def test_example_inputs_are_not_run():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            assert "conv" not in name and "relu" not in name, name
            return super().__torch_function__(func, types, args, kwargs or {})

    loud = torch.zeros(1, 4, 8, 8).as_subclass(Loud)
    assert kept(nmconv.make_plan(staged(), example_inputs=loud, keep="boundary")) == "dKdKdK"


# --- nothing is touched -----------------------------------------------------------------------------------------------


def test_planning_touches_nothing():
    for model in (staged(), timm.create_model("resnet10t"), timm.create_model("mobilenetv3_small_050")):
        for training in (False, True):
            model.train(training)
            before = untouched(model)
            nmconv.make_plan(model, keep="boundary")
            nmconv.make_plan(model, "3:1", relocate=True, keep="spread")
            assert untouched(model) == before


def test_converting_a_copy_touches_nothing():
    for model in (staged(), timm.create_model("resnet10t"), zoo.build("torchvision/resnet18")):
        before = untouched(model)
        new = nmconv.convert(model, "3:1", keep="boundary")
        assert untouched(model) == before
        assert not {id(part) for part in new.modules()} & {id(part) for part in model.modules()}
        assert not {part.data_ptr() for part in new.parameters()} & {part.data_ptr() for part in model.parameters()}


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    """The last step of the surgery fails: all that came before is taken back."""

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.c2, self.relu = conv(), conv(), nn.ReLU()

        def __setattr__(self, name, value):
            if name == "__class__" and value is not type(self):
                raise RuntimeError("this one keeps its class")
            super().__setattr__(name, value)

        def forward(self, x):
            return self.relu(self.c2(self.relu(self.c1(x))))

    model = nn.Sequential(run_of(2), Stubborn(), run_of(2))
    before = untouched(model)
    with pytest.raises((RuntimeError, NmconvError)):
        nmconv.convert(model, inplace=True, keep="boundary")
    assert untouched(model) == before
    assert nmconv.get_plan(model) is None


def test_in_place_is_the_model_itself():
    model = staged()
    assert nmconv.convert(model, inplace=True, keep="boundary") is model
    assert nmconv.get_plan(model) == nmconv.make_plan(staged(), keep="boundary")
    other = staged()
    assert nmconv.apply_plan(other, nmconv.make_plan(other, keep="boundary"), inplace=True) is other


def test_every_error_has_one_base():
    for error in (
        RatioError,
        OptionError,
        PatternError,
        PlanError,
        NoSitesError,
        ModelTypeError,
        AlreadyConvertedError,
    ):
        assert issubclass(error, NmconvError)
    assert issubclass(RatioError, ValueError) and issubclass(ModelTypeError, TypeError)
    assert issubclass(NoEffectWarning, Warning)


def test_a_merged_model_is_not_converted():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
    merged = nmconv.merge(model)
    with pytest.raises(nmconv.AlreadyConvertedError, match="merged already"):
        nmconv.convert(merged, "2:1", keep="boundary")
    with pytest.raises(nmconv.AlreadyConvertedError, match="merged by itself"):
        nmconv.make_plan(nn.Sequential(merged), "2:1", keep="boundary")


def test_a_plan_says_the_same_in_every_process():
    """What is called in surroundings that differ is a set, whose order goes by the process' hashes."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(8))
            self.acts = nn.ModuleList(nn.ReLU() for _ in range(8))

        def forward(self, x):
            for layer, act in zip(self.convs, self.acts, strict=True):
                x = layer(torch.tanh(act(layer(x))))
            return x

    model = Shared()
    leading = [index for index, _ in structure_of(model, record_model(model, torch.rand(2, 4, 5, 5))).leading]
    assert len(leading) == 8
    assert leading == sorted(leading)


def test_the_first_activations_stay_by_default():
    model = staged()
    plan = nmconv.make_plan(model)
    assert plan == nmconv.make_plan(model, "2:1", keep="first") == nmconv.get_plan(nmconv.convert(model))
    assert kept(plan) == "KdKdKd"


@pytest.mark.parametrize(("keep", "other"), [("first", "boundary"), ("boundary", "first")])
def test_the_printed_plan_tells_what_the_other_end_is_for(keep, other):
    line = str(nmconv.make_plan(staged(), keep=keep)).splitlines()[1]
    assert line.startswith(f"keep='{keep}': ") and f"'{other}'" in line
    for plan in (nmconv.make_plan(staged(), keep="spread"), nmconv.make_plan(staged(), "1:1", keep=keep)):
        assert str(plan).splitlines()[1].startswith("site ")
