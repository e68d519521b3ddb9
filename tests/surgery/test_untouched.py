"""Conversion leaves nothing behind in torch or in the original, and in place all or nothing."""

import contextlib
import functools
import gc
import random
import sys
import types
import warnings

import pytest
import torch
from converted_nets import LIGHT, RUN, Block, Net, both, build, fitting, picture, slow, wanted
from oracle import assert_same
from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer

import nmconv

torch.set_num_threads(1)


TRACES = (Proxy, Node, Graph, GraphModule, Tracer)


def leftovers(value, path, seen, depth=6):
    """Paths of everything of a trace, looking into attributes, containers and closures."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(value, (*TRACES, FakeTensor)) or (
        type(value).__module__.startswith("nmconv.") and not isinstance(value, nmconv.Plan)
    ):
        if isinstance(value, nn.Module) and not isinstance(value, GraphModule):
            pass  # an identity that copies
        else:
            yield f"{path}: {type(value)}"
            return
    if id(value) in seen or depth == 0 or isinstance(value, (nmconv.Plan, torch.Tensor, type, types.ModuleType)):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for key, part in list(value.items()):
            yield from leftovers(part, f"{path}[{key!r}]", seen, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield from leftovers(part, f"{path}[]", seen, depth - 1)
    elif isinstance(value, nn.Module):
        for key, part in list(vars(value).items()):
            yield from leftovers(part, f"{path}.{key}", seen, 6)
    elif isinstance(value, functools.partial):
        yield from leftovers((value.args, value.keywords), path, seen, depth - 1)
    elif hasattr(value, "__dict__"):
        yield from leftovers(vars(value), path, seen, depth - 1)


def attributes(model):
    """All attributes of all modules, by name, with what their containers hold."""
    return {
        f"{path}.{key}": (id(value), shallow(value))
        for path, module in model.named_modules()
        for key, value in vars(module).items()
    }


def shallow(value):
    if isinstance(value, dict):
        return [(repr(key), id(part)) for key, part in value.items()]
    if isinstance(value, (list, set, tuple)):
        return sorted(map(id, value))
    return None


# --- nothing is left behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RUN, "net", "prelu", slow("torchvision/retinanet_resnet50_fpn")])
def test_nothing_of_the_tracing_stays(name):
    model = build(name)
    before = attributes(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    nmconv.make_plan(model)
    assert attributes(model) == before, "planning has changed an attribute"
    converted = nmconv.convert(model)
    assert attributes(model) == before, "converting a copy has changed an attribute of the original"
    assert_same(dict(model.state_dict()), state, "the original")
    assert list(leftovers(model, "model", set())) == []
    assert list(leftovers(converted, "converted", set())) == []
    nmconv.convert(model, inplace=True)
    after = attributes(model)
    new = {key.rpartition(".")[2] for key in after if key not in before}
    assert new <= {"_nmconv_plan", "_nmconv_was", "_nmconv_frozen"}
    assert_same(dict(model.state_dict()), state)
    assert list(leftovers(model, "model", set())) == []


@pytest.mark.parametrize("name", ["timm/levit_128s", "timm/efficientformer_l1"])
def test_attention_caches(name):
    """They are filled in eval mode by device; a trace must not fill them, nor a conversion empty them."""
    model = build(name)
    x = fitting(name)
    gone = nmconv.get_plan(nmconv.convert(model)).changes
    caches = [module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache")]
    assert caches and not any(caches)
    with torch.no_grad():
        model(x)
    assert all(caches)
    kept = [dict(cache) for cache in caches]
    converted = nmconv.convert(model)
    assert all(cache[key] is value for cache, known in zip(caches, kept, strict=True) for key, value in known.items())
    with torch.no_grad():
        assert_same(converted(x), wanted(model, gone, model, x))
        converted.train()
        converted.eval()
        assert_same(converted(x), wanted(model, gone, model, x))


def world():
    import numpy

    return {
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": repr(numpy.random.get_state()),
        "call": nn.Module.__call__,
        "getattr": nn.Module.__getattr__,
        "module": dict(vars(nn.Module)),
        "is_tensor": torch.is_tensor,
        "isinstance": sorted(
            name
            for name, module in list(sys.modules.items())
            if "isinstance" in (getattr(module, "__dict__", None) or {})
        ),
        "filters": list(warnings.filters),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes": torch.overrides._get_current_function_mode_stack(),
        "trace": sys.gettrace(),
        "recursion": sys.getrecursionlimit(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.mark.parametrize(
    "name", ["timm/levit_128s", "torchvision/googlenet", "torchvision/retinanet_resnet50_fpn", "net"]
)
def test_the_world_outside_stays_as_it_was(name):
    model = build(name)
    nmconv.make_plan(model)  # what it imports is imported now
    before = world()
    assert "training" not in before["module"]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        plan = nmconv.make_plan(model)
        nmconv.apply_plan(model, plan)
        nmconv.convert(model, "4:1", keep="spread", inplace=True)
        assert warnings.filters == inside
    assert [str(warning.message) for warning in heard] == []
    after = world()
    assert list(after) == list(before)
    for key in before:
        assert after[key] == before[key], key


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.conv, self.error = nn.Conv2d(3, 3, 1), error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1), RecursionError("deep")])
def test_the_world_stays_as_it_was_when_planning_fails(error):
    model = Failing(error)
    before = world()
    with pytest.raises(type(error) if not isinstance(error, Exception) else nmconv.OptionError):
        nmconv.convert(model)
    after = world()
    for key in before:
        assert after[key] == before[key], key


class EntersByHand(nn.Module):
    """Whoever stops its forward in the middle leaves these entered."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.contexts = (torch.autocast("cpu", enabled=False), torch.no_grad())

    def forward(self, x):
        entered = [(context, context.__enter__()) for context in self.contexts]
        if self.training:
            raise ValueError("no")
        x = nn.functional.relu(self.b(nn.functional.relu(self.a(x))))
        for context, _ in reversed(entered):
            context.__exit__(None, None, None)
        return x


@pytest.mark.parametrize("around", [contextlib.nullcontext, lambda: torch.autocast("cpu"), torch.no_grad])
def test_contexts_that_a_forward_leaves_entered_are_left(around):
    def state():
        depth = torch.autocast_increment_nesting()
        torch.autocast_decrement_nesting()
        return depth, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    with around():
        before = state()
        plan = nmconv.make_plan(EntersByHand())
        assert plan.untraced and any(site.locked for site in plan.sites)
        assert state() == before


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid())])
def test_the_world_stays_as_it_was_when_there_is_nothing_to_convert(model):
    before = world()
    with pytest.raises(nmconv.NoSitesError):
        nmconv.convert(model, inplace=True)
    after = world()
    for key in before:
        assert after[key] == before[key], key
    assert "_nmconv_plan" not in vars(model)


# --- in place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LIGHT, "prelu", "torchvision/googlenet"])
def test_in_place_conversion_copies_nothing(name, monkeypatch):
    model = build(name)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    modules = dict(model.named_modules())
    expected_plan = nmconv.make_plan(model)

    def no_copy(self, memo):
        raise AssertionError("a parameter was copied")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", no_copy)
    converted = nmconv.convert(model, inplace=True)
    assert converted is model
    assert nmconv.get_plan(model) == expected_plan
    assert all(value is parameters[key] for key, value in model.named_parameters())
    assert all(value is buffers[key] for key, value in model.named_buffers())
    gone = {site.name for site in expected_plan.changes}
    for key, module in model.named_modules():
        assert module is modules[key] or key in gone


def test_a_conversion_that_is_not_in_place_leaves_the_original_alone():
    for name in LIGHT:
        model = build(name)
        before = attributes(model)
        x = picture(32)
        with torch.no_grad():
            output = model(x)
            converted = nmconv.convert(model)
            assert attributes(model) == before
            for parameter in converted.parameters():
                parameter.zero_()
            assert_same(model(x), output)
        assert not {id(p) for p in converted.parameters()} & {id(p) for p in model.parameters()}


def everything_of(model):
    return (
        {name: (id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)},
        attributes(model),
        [list(module._modules) for module in model.modules()],
    )


@pytest.mark.parametrize("where", ["commit", "check"])
@pytest.mark.parametrize(
    ("name", "relocate"), [("timm/mobilenetv2_100", True), ("torchvision/resnet18", False), ("net", False)]
)
def test_an_in_place_conversion_that_fails_leaves_the_model_as_it_was(name, relocate, where, monkeypatch):
    """Nothing of the model changes before all is done and checked on a copy."""
    from nmconv.surgery import apply

    model = build(name)
    plan = nmconv.make_plan(model, "3:1", relocate=relocate)
    before = everything_of(model)
    failed = []

    class Failure(BaseException):
        pass

    home, target = {"commit": (apply.Surgery, "commit"), "check": (nmconv.surgery.Witness, "check")}[where]
    real = getattr(home, target)

    def failing(*args, **kwargs):
        real(*args, **kwargs)
        failed.append(everything_of(model) == before)
        raise Failure

    with monkeypatch.context() as patch:
        patch.setattr(home, target, failing)
        with pytest.raises(Failure):
            nmconv.apply_plan(model, plan, inplace=True)
    assert failed == [True]
    assert everything_of(model) == before
    assert nmconv.get_plan(model) is None
    nmconv.apply_plan(model, plan, inplace=True)
    assert nmconv.get_plan(model) == plan


def test_a_model_that_cannot_be_changed_is_left_as_it_was():
    """A class that does not let its instances change class."""

    class Stubborn(Block):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise AttributeError("no")
            super().__setattr__(name, value)

    model = build("net")
    model.blocks[1] = Stubborn(8)
    before = everything_of(model)
    with pytest.raises(AttributeError, match="no"):
        nmconv.convert(model, "4:1", inplace=True)
    assert everything_of(model) == before


def test_memory_is_given_back():
    """Nothing holds on to a model that was planned or converted."""
    import weakref

    model = build("net")
    converted = nmconv.convert(model)
    plan = nmconv.get_plan(converted)
    refs = [weakref.ref(module) for each in (model, converted) for module in each.modules()]
    del model, converted
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []
    assert plan.changes


def test_what_users_of_modules_do():
    model, _gone, converted = both("net")
    assert converted.blocks[0].describe() == "8 wide"
    assert isinstance(converted.blocks[0], Block) and isinstance(converted, Net)
    assert issubclass(type(converted.blocks[0]), Block)
    assert converted.blocks[0].scale == 2.0
    assert converted.get_submodule("blocks.1.act") is converted.blocks[1].act
    names = []
    converted.apply(lambda module: names.append(type(module).__name__))
    assert names.count("Block") == 2
    assert sum(p.numel() for p in converted.parameters()) == sum(p.numel() for p in model.parameters())
    assert converted.train() is converted and converted.eval() is converted
    assert converted.to(torch.float64)(picture(16).double()).dtype == torch.float64
    converted.blocks.append(Block(8))
    assert converted.double()(picture(16).double()).shape == (2, 5)
    optimizer = torch.optim.AdamW(converted.parameters())
    assert len(optimizer.param_groups[0]["params"]) == len(list(converted.parameters()))


def test_the_source_of_a_rewritten_method_shows_in_tracebacks():
    import traceback

    _, _, converted = both("net")
    try:
        converted.blocks[0](picture(16))  # three channels where eight are wanted
    except RuntimeError as error:
        text = "".join(traceback.format_exception(error))
    assert "nmconv" in text and "self.conv1(" in text
