"""Models that cannot be planned or on which a plan has no effect; planning touches nothing."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import conv, convs, expect, net, relus, rows
from plan_nets import CALLS, kept, refused, run_of, staged, untouched
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
    PlanError,
    RatioError,
)
from nmconv.finding import structure_of
from nmconv.flow import record_model


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


# --- models that are none ------------------------------------------------------------------------------------------


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


# --- no sites, no effect -------------------------------------------------------------------------------------------


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


# --- converted already ---------------------------------------------------------------------------------------------


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


def failing_in_train_mode(self, x):
    if self.training:
        raise ValueError("no targets")
    return F.relu(self.c1(x))


# --- what could not be traced --------------------------------------------------------------------------------------


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


# --- nothing is touched --------------------------------------------------------------------------------------------


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
