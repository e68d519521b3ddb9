"""Changing a model in place: tried on a copy, then taken over; modules, parameters and what others hold stay."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import nmconv

X = torch.zeros(2, 3, 8, 8)


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.a, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), act()
        self.b, self.out = nn.Conv2d(4, 4, 3, padding=1), act()
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.d(self.c(self.out(self.b(self.act(self.norm(self.a(x))))))) + x


class Net(nn.Module):
    """Two blocks, a closure over one of them and a bound method."""

    def __init__(self, act=nn.ReLU, closure=True):
        super().__init__()
        self.stem, self.one, self.two, self.tail = nn.Conv2d(3, 4, 1), Block(act), Block(act), nn.Conv2d(4, 2, 1)
        first = self.one
        object.__setattr__(self, "through", (lambda x: first(x)) if closure else first)
        self.ended = self.end
        self.seen = []

    def end(self, x):
        return self.tail(self.two(x))

    def forward(self, x):
        return self.ended(self.through(self.stem(x)))


def net(act=nn.ReLU, closure=True):
    torch.manual_seed(0)
    model = Net(act, closure)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, 3, 8, 8))
    return model.eval()


def everything_in(model):
    """All objects that the modules' attributes hold, however deep."""
    todo, found = [vars(module) for module in model.modules()], {}
    while todo:
        value = todo.pop()
        if id(value) in found or isinstance(value, (type, torch.Tensor)):
            continue
        found[id(value)] = value
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            todo += list(value)
        elif hasattr(value, "__self__") and hasattr(value, "__func__"):
            todo += [value.__self__]
        elif getattr(value, "__closure__", None):
            todo += [cell.cell_contents for cell in value.__closure__]
        elif hasattr(value, "__dict__"):
            todo.append(vars(value))
    return list(found.values())


def changed(how, model):
    if how == "convert":
        return nmconv.convert(model, "3:1", keep="first", relocate=True, example_inputs=X, inplace=True)
    if how == "hoist":
        return nmconv.convert(model, "3:1", hoist_padding=True, example_inputs=X, inplace=True)
    if how == "merge":
        return nmconv.merge(model, gate="always", example_inputs=X, inplace=True)
    if how == "live":
        return nmconv.merge(model, gate="always", live=True, example_inputs=X, inplace=True)
    return nmconv.fold_norms(model, example_inputs=X, inplace=True)


WAYS = ["convert", "hoist", "merge", "live", "fold"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU])
def test_only_modules_of_the_model_are_in_it(how, act):
    """Nothing of the copy is left, and modules and parameters that stay are the same objects."""
    model = net(act)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    closure, method, seen = model.through, model.ended, model.seen
    expected = changed(how, net(act, closure=False))
    assert changed(how, model) is model
    known = {id(module) for module in model.modules()} | {id(module) for module in modules.values()}
    strangers = [value for value in everything_in(model) if isinstance(value, nn.Module) and id(value) not in known]
    assert strangers == []
    assert model.through is closure and model.ended is method and model.seen is seen
    merged = {merge.head for merges in nmconv.get_merges(model) for merge in merges if not merge.live}
    for name, value in model.named_parameters():
        assert value is parameters[name] or name.rpartition(".")[0] in merged
    for name in ("one", "two", "stem", "two.a", "two.norm", "tail"):
        if how in ("convert", "hoist") or name in ("one", "two"):
            assert model.get_submodule(name) is modules[name]
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))


def test_the_copy_is_freed():
    model = net()
    seen = []
    real = nmconv.surgery.WorkingCopy.finish

    def finish(self):
        seen.append(weakref.ref(self.model))
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nmconv.surgery.WorkingCopy, "finish", finish)
        changed("convert", model)
        changed("fold", model)
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


def test_hooks_and_optimizers_go_on():
    model, calls = net(nn.PReLU), []
    handle = model.one.act.register_forward_hook(lambda *_: calls.append(1))
    act = model.one.act
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmconv.convert(model, "3:1", example_inputs=X, inplace=True)
    assert model.one.act is act and calls == []
    model(X)
    assert len(calls) == 1
    handle.remove()
    model(X)
    assert len(calls) == 1
    before = model.stem.weight.detach().clone()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.stem.weight, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_handle_removes_the_hook_of_the_model_that_holds_it(inplace):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    seen = []
    model[3].handle = model[3].register_forward_hook(lambda *call: seen.append(0), always_call=True)
    new = nmconv.convert(model, "2:1", inplace=inplace)
    seen.clear()
    new(X)
    assert len(seen) == 1
    new[3].handle.remove()
    new(X)
    assert len(seen) == 1 and len(model[3]._forward_hooks) == (not inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_graph_module_inside_of_another_one(inplace):
    from torchvision.models.feature_extraction import create_feature_extractor

    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    graph = create_feature_extractor(inner, ["3"])
    new = nmconv.convert(nn.Sequential(nn.Identity(), graph), "2:1", inplace=inplace, keep="boundary")
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(new(x)["3"], inner[3](inner[2](inner[0](x))))
    assert (new[1] is graph) == inplace


def test_an_activation_in_two_slots_keeps_its_other_one():
    shared = nn.PReLU()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Conv2d(4, 4, 1), shared).eval()
    expected = shared(model[2](model[0](X)))
    nmconv.convert(model, "3:1", example_inputs=X, inplace=True, keep="boundary")
    assert model[3] is shared and model[1].weight is shared.weight
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("how", ["merge", "fold"])
def test_removed_parameters_are_named(how):
    model = net()
    with pytest.warns(nmconv.RemovedParametersWarning, match=r"parameters of this Net are gone \(one\."):
        changed(how, model)


def test_a_live_merge_removes_none():
    model = net()
    parameters = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed("live", model)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def test_loading_in_place_keeps_parameters_and_gives_them_the_numbers(tmp_path):
    saved = nmconv.convert(net(), "3:1", example_inputs=X, inplace=True)
    with torch.no_grad():
        saved.stem.weight.mul_(2)
    nmconv.save(saved, tmp_path / "model")
    model = net()
    outside = model.stem.weight.view(-1)  # memory that somebody else has
    parameters = list(model.parameters())
    assert nmconv.load(model, tmp_path / "model", example_inputs=X, inplace=True) is model
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(outside, saved.stem.weight.view(-1))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), saved(x))


def test_fitting_in_place_with_a_closure():
    """A deep copy would run the original's parts; the working copy runs its own."""
    reference = net()
    model = nmconv.convert(net(), "3:1", example_inputs=X, inplace=True)
    parameters = dict(model.named_parameters())
    before = {name: value.detach().clone() for name, value in parameters.items()}
    data = torch.randn(64, 3, 8, 8)
    assert nmconv.fit(model, data, reference=reference, inplace=True) is model
    report = nmconv.get_fit(model)
    assert report.returned.loss < report.converted.loss
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())
