"""How merging is called, what it leaves alone, and what a merged model goes through afterwards."""

import copy
import pickle
import random
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from merge_nets import assert_agree, assert_near, convs_of, counts, merge, picture, settle, snapshot, statistics
from torch import nn
from torch.overrides import TorchFunctionMode

import nmconv
from nmconv.merging import latency_gate
from nmconv.timing import Timing

torch.set_num_threads(1)


class Block(nn.Module):
    """1x1 up, norm, padded 3x3, norm, 1x1 down, norm, plus the identity: one convolution, with a border to correct."""

    def __init__(self, width=4, wide=12):
        super().__init__()
        self.up, self.bn1 = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.deep = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn2, self.drop = nn.BatchNorm2d(wide), nn.Dropout(0.2)
        self.down, self.bn3 = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.bn2(self.deep(self.bn1(self.up(x))))
        return self.bn3(self.down(self.drop(y))) + x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList([Block(), Block()])
        self.act, self.last = nn.ReLU(), nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 5)

    def forward_features(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.act(block(x))
        return self.last(x)

    def forward(self, x):
        return self.head(self.forward_features(x).flatten(2).mean(2))


SHAPES = [(3, size, 24 - size) for size in range(1, 24, 2)]


def original():
    torch.manual_seed(0)
    return settle(Net())


@pytest.fixture
def model():
    return original()


@pytest.fixture
def merged(model):
    result = merge(model)
    assert (convs_of(model, 3, 24, 24), convs_of(result, 3, 24, 24)) == (8, 4)
    return result


# Modes ---------------------------------------------------------------------------------------------------------------


def test_train_mode_is_an_error_that_names_eval(model):
    model.train()
    for call in (nmconv.merge, nmconv.fold_norms):
        with pytest.raises(nmconv.NmconvError, match=r"eval\(\)"):
            call(model)
    assert nmconv.find_runs(model) == nmconv.find_runs(model.eval())


@pytest.mark.parametrize("part", ["blocks.1.bn2", "blocks.0", "blocks.1.drop"])
def test_a_part_in_train_mode_is_named(model, part):
    model.get_submodule(part).train()
    before = snapshot(model)
    with pytest.raises(nmconv.NmconvError, match=part.replace(".", r"\.")):
        nmconv.merge(model, gate="always", inplace=True)
    assert snapshot(model) == before


def test_train_on_a_merged_model_keeps_norms_folded_and_says_so_once(merged, model):
    x = picture(3, 24, 24)
    with pytest.warns(UserWarning, match="norm") as caught:
        merged.train()
        merged(x)
    assert len(caught) == 1
    merged.train()
    with torch.no_grad():
        merged(x)
    merged.eval()
    merged.train()
    merged.eval()
    assert assert_agree(merged, model, *SHAPES)


def test_training_what_was_merged(merged):
    """Weights of merged convolutions are parameters like others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged.train()
    optimizer = torch.optim.SGD(merged.parameters(), 0.01)
    x = picture(3, 24, 24)
    losses = []
    for _ in range(3):
        loss = merged(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


# Copies and failures -------------------------------------------------------------------------------------------------


def test_a_copy_leaves_the_original_untouched(model):
    random.seed(3)
    before, state = snapshot(model), random.getstate()
    merged = merge(model, example_inputs=picture(3, 24, 24))
    assert snapshot(model) == before and random.getstate() == state
    mine = {value.data_ptr() for value in model.state_dict().values() if value.numel()}
    assert not mine & {value.data_ptr() for value in merged.state_dict().values() if value.numel()}
    assert not {id(module) for module in model.modules()} & {id(module) for module in merged.modules()}
    for one in (nmconv.find_runs(model), nmconv.fold_norms(model)):
        assert one and snapshot(model) == before


def test_in_place(model):
    other = copy.deepcopy(model)
    block, conv = model.blocks[0], model.last
    assert merge(model, inplace=True) is model
    assert model.blocks[0] is block and model.last is conv
    assert convs_of(model, 3, 24, 24) == 4
    assert assert_agree(model, other, *SHAPES)


class Fails(TorchFunctionMode):
    """Every call of torch but those before the given number raises; counts them, too."""

    def __init__(self, at):
        super().__init__()
        self.at, self.number = at, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if "grad_enabled" not in getattr(func, "__name__", ""):  # what contexts call to leave
            self.number += 1
            if self.number > self.at:
                raise MemoryError(f"number {self.number}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"live": True}, {"examples": True}])
def test_a_call_of_torch_that_fails_midway_changes_nothing(model, options):
    """Out of memory from some point on: the model is what it was, bit for bit, also in place."""
    options = {"example_inputs": picture(3, 24, 24)} if "examples" in options else options
    copied, failed = original(), 0
    with Fails(10**9) as all_of_them:
        merge(original(), inplace=True, **options)
    total = all_of_them.number
    before = snapshot(model)
    for at in sorted({*range(0, total, max(1, total // 50)), *range(max(0, total - 8), total)}):
        try:
            with Fails(at):
                merge(model, inplace=True, **options)
        except (MemoryError, nmconv.NmconvError):
            failed += 1
            assert snapshot(model) == before, f"call {at} of {total}"
        else:
            assert assert_agree(model, copied, *SHAPES)
            model = original()
            before = snapshot(model)
    assert failed > 20


@pytest.mark.parametrize("name", ["__setattr__", "__delattr__", "add_module", "register_buffer", "register_parameter"])
def test_a_module_that_refuses_a_change(model, monkeypatch, name):
    """Whichever change is refused, those before it are undone."""
    real, calls, limit = getattr(nn.Module, name), [0], [10**9]

    def stubborn(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == limit[0]:
            raise AttributeError("no")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, name, stubborn)
    other = original()
    start = calls[0]
    merge(other, inplace=True)
    each, before = calls[0] - start, snapshot(model)
    for at in range(1, each + 1, max(1, each // 60)):
        calls[0], limit[0] = 0, at
        try:
            merge(model, inplace=True)
        except (AttributeError, nmconv.NmconvError):
            limit[0] = 10**9
            assert snapshot(model) == before, f"change {at} of {each}"
        else:
            limit[0] = 10**9
            model = original()
            before = snapshot(model)


def test_what_cannot_be_copied_is_shared(model):
    class Unique:
        def __deepcopy__(self, memo):
            raise TypeError("there is one of it")

    model.part = Unique()
    before = snapshot(model)
    merged = nmconv.merge(model)
    assert merged.part is model.part and snapshot(model) == before
    assert_agree(model, merged, *SHAPES)


# Gates and options ---------------------------------------------------------------------------------------------------


def test_nothing_merges_below_the_gain(model):
    runs = nmconv.find_runs(model)
    best = max(run.gain for run in runs)
    assert best > 1.2
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(model, min_gain=1000.0)
    assert convs_of(merged, 3, 24, 24) == 8
    assert assert_agree(merged, model, *SHAPES)
    assert all(run.why and not run.merges for run in nmconv.find_runs(model, min_gain=1000.0))


def test_a_merge_that_costs_more_is_not_made():
    """Depthwise then pointwise: a dense kernel would take nine times as long."""
    model = settle(nn.Sequential(nn.Conv2d(32, 32, 3, groups=32, padding=1), nn.Conv2d(32, 32, 1)))
    assert convs_of(merge(model, gate="multiply_adds"), 32, 16, 16) == 2
    assert convs_of(merge(model, gate="always"), 32, 16, 16) == 1
    (run,) = nmconv.find_runs(model)
    assert run.exact and run.why and run.merges == () and run.gain == pytest.approx(1.0)


def taking(monkeypatch, *seconds):
    """Each timing finds one second before, and one of these after; gives how many rounds each had."""
    passes, left = [], list(seconds)

    def timed(runners, *, rounds, seconds):
        passes.append(rounds)
        after = left.pop(0)
        return [Timing((1.0,) * 3), Timing(after if isinstance(after, tuple) else (after,) * 3)]

    monkeypatch.setattr(latency_gate, "time_interleaved", timed)
    return passes


@pytest.mark.parametrize(
    ("seconds", "convs"),
    [
        ((0.98,), 2),
        ((0.5, 1.2), 2),  # of many candidates some are lucky once: only the second measurement counts
        ((0.5, 0.9, 0.5, 1.0), 1),
        ((0.5, 0.9, 1.01), 2),  # a run that is faster, and a model that is not
        ((0.5, 0.9, 0.5, 1.01), 2),
        ((0.5, 0.9, (0.8, 1.1, 1.2), (0.9, 1.005, 1.1)), 1),  # as fast, as well as that can be told
        ((0.5, 0.9, (0.8, 1.1, 1.2), (0.9, 1.02, 1.1)), 2),  # slower in the median, though not surely
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_was_faster_is_timed_again_and_so_is_the_whole(seconds, convs, inplace, monkeypatch):
    passes = taking(monkeypatch, *seconds)
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Flatten()))
    options = {"gate": "latency", "example_inputs": picture(3, 16, 16), "inplace": inplace}
    before, original = snapshot(net), copy.deepcopy(net)
    if convs == 1:
        merged = nmconv.merge(net, **options)
    else:
        together = "together, the runs that gain 1.05 each make it slower on eager"
        with pytest.warns(nmconv.NoEffectWarning, match=together if len(seconds) > 2 else "no linear run"):
            merged = nmconv.merge(net, **options)
    assert convs_of(merged, 3, 16, 16) == convs
    assert [merge.convs for merge in nmconv.get_merges(merged)[0] if len(merge.convs) > 1] == [("0", "2")] * (2 - convs)
    assert not isinstance(merged[1], nn.BatchNorm2d)  # folded either way
    assert merged is net if inplace else snapshot(net) == before
    assert assert_agree(merged, original, (3, 16, 16))
    assert len(passes) == len(seconds) and all(
        early < late for early, late in zip(passes[::2], passes[1::2], strict=False)
    )


class Stateful(nn.Module):
    """Two convolutions that merge, beside all that a call may leave behind."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 2, 1)
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image, *, factor=1.0):
        self.calls += 1
        return self.two(self.one(image.mul_(2))) * factor + self.drop(self.norm(image)).mean()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_what_is_timed_is_not_what_is_returned(named, inplace):
    """The state that calls leave, train modes, hooks and inputs are as with a gate that times nothing."""

    def merged(gate):
        torch.manual_seed(0)
        net, image, seen = settle(Stateful()), picture(3, 64, 64), []
        net.norm.train(), net.drop.train()
        net.drop.register_forward_hook(lambda *_: seen.append(1))
        before = image.clone()
        examples = {"factor": torch.ones(1), "image": image} if named else image
        found = nmconv.merge(net, gate=gate, example_inputs=examples, inplace=inplace)
        assert torch.equal(image, before)
        assert [merge.convs for merge in nmconv.get_merges(found)[0]] == [("one", "two")]
        assert [part.training for part in (found, found.norm, found.drop)] == [False, True, True]
        assert len(found.drop._forward_hooks) == 1
        return found.state_dict(), len(seen)

    (timed, calls), (counted, fewer) = merged("latency"), merged("multiply_adds")
    assert (
        calls <= 2 * fewer + inplace
    )  # whose outputs are compared once more; hooks of the working copy write to its own list
    if not inplace:
        assert all(torch.equal(value, counted[name]) for name, value in timed.items())
    assert float(timed["calls"]) <= float(counted["calls"]) + 1


class Drawing(nn.Module):
    """Two convolutions that merge, and a forward that draws from every source there is."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 2, 1)
        self.own = torch.Generator().manual_seed(0)

    def forward(self, x):
        x = F.dropout(self.two(self.one(x)), 0.5, True)
        return x * (random.random() + np.random.random() + torch.rand((), generator=self.own)) + torch.randn_like(x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("gate", ["multiply_adds", "latency"])
def test_a_model_that_draws_is_compared_on_the_same_draws(gate, inplace):
    """By luck two draws are alike, by more luck one of three: many seeds tell. Nothing is drawn for the caller."""
    for seed in range(3 if gate == "latency" else 12):
        net, x = settle(Drawing()), picture(3, 64, 64)
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        state = torch.get_rng_state(), random.getstate(), np.random.get_state(), net.own.get_state()
        found = nmconv.merge(net, gate=gate, example_inputs=x, inplace=inplace)
        assert [merge.convs for merge in nmconv.get_merges(found)[0]] == [("one", "two")]
        assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
        assert all(map(np.array_equal, np.random.get_state(), state[2]))
        assert torch.equal(net.own.get_state(), state[3]) and torch.equal(found.own.get_state(), state[3])


@pytest.mark.parametrize(("failing", "convs"), [("before", 1), ("after", 2), ("both", 1), ("later", 1)])
def test_a_whole_that_a_backend_refuses(failing, convs, monkeypatch):
    """Nothing is known where the original cannot be run; what merging made impossible is not faster."""
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3), nn.Flatten()))
    ours, wholes = latency_gate.make_runner, []

    def runner(module, inputs, backend):
        if isinstance(module, nn.Sequential) or not hasattr(module, "model"):
            return ours(module, inputs, backend)
        wholes.append(sum(isinstance(part, nn.Conv2d) for part in module.modules()))
        if failing == "both" or failing == {2: "before", 1: "after"}[wholes[-1]]:
            raise nmconv.OptionError("no")
        return ours(module, inputs, backend) if failing != "later" else lambda: 1 / 0

    monkeypatch.setattr(latency_gate, "make_runner", runner)
    monkeypatch.setattr(latency_gate.LatencyGate, "_measured", lambda self, segment: (1.0, 2.0))
    merged = merge(net, gate="latency", example_inputs=picture(3, 16, 16))
    assert wholes and convs_of(merged, 3, 16, 16) == convs


def test_a_model_that_a_backend_cannot_run_whole_is_gated_by_its_runs(monkeypatch):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3))

        def forward(self, x):
            return self.body(x).flatten(1) if float(x.sum()) > 1e9 else self.body(x)

    passes = taking(monkeypatch, 0.5, 0.5)
    merged = nmconv.merge(settle(Asking()), gate="latency", backend="compile", example_inputs=picture(3, 16, 16))
    assert len(passes) == 2
    assert [merge.convs for merge in nmconv.get_merges(merged)[0]] == [("body.0", "body.1")]


def test_latency_gate(model):
    x = picture(3, 24, 24)
    merged = merge(model, gate="latency", example_inputs=x)
    assert assert_agree(merged, model, *SHAPES)
    wide = settle(nn.Sequential(nn.Conv2d(3, 256, 3, padding=1), nn.Conv2d(256, 4, 1)))
    assert convs_of(merge(wide, gate="latency", example_inputs=picture(3, 64, 64)), 3, 64, 64) == 1
    slow = settle(nn.Sequential(nn.Conv2d(96, 96, 3, groups=96, padding=1), nn.Conv2d(96, 96, 1)))
    assert convs_of(merge(slow, gate="latency", example_inputs=picture(96, 48, 48, batch=2)), 96, 48, 48) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "speed"},
        {"gate": None},
        {"gate": "FLOPS"},
        {"gate": ["multiply_adds"]},
        {"gate": "latency"},
        {"backend": "tensorrt"},
        {"backend": None},
        {"backend": 3, "gate": "latency", "example_inputs": torch.zeros(1, 3, 24, 24)},
        {"min_gain": 0},
        {"min_gain": -1.0},
        {"min_gain": float("nan")},
        {"min_gain": float("inf")},
        {"min_gain": "1.05"},
        {"min_gain": None},
        {"min_gain": True},
        {"methods": {"nope": torch.zeros(1, 3, 24, 24)}},
        {"methods": ["forward_features"]},
    ],
)
def test_bad_options(model, options):
    before = snapshot(model)
    with pytest.raises(nmconv.OptionError) as caught:
        nmconv.merge(model, **options)
    assert len(str(caught.value)) > 20
    if options.keys() == {"min_gain"}:
        with pytest.raises(nmconv.OptionError, match="min_gain="):
            nmconv.find_runs(model, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("examples", [torch.zeros(2, 7, 9, 9), (), torch.zeros(3), {"y": torch.zeros(1)}])
def test_examples_that_do_not_fit(model, examples):
    before = snapshot(model)
    with pytest.raises(nmconv.OptionError, match="cannot be called with"):
        nmconv.merge(model, gate="always", example_inputs=examples, inplace=True)
    assert snapshot(model) == before


@pytest.mark.parametrize("call", [nmconv.merge, nmconv.find_runs, nmconv.fold_norms])
@pytest.mark.parametrize("kind", ["none", "class", "function", "tensor", "compiled", "scripted", "traced", "parallel"])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_no_plain_module(call, kind):
    model = original().float()
    wrapped = {
        "none": lambda: None,
        "class": lambda: Net,
        "function": lambda: model.forward,
        "tensor": lambda: torch.zeros(3),
        "compiled": lambda: torch.compile(model, backend="eager"),
        "scripted": lambda: torch.jit.script(model.stem),
        "traced": lambda: torch.jit.trace(model, torch.zeros(1, 3, 24, 24)),
        "parallel": lambda: nn.DataParallel(model),
    }[kind]()
    with pytest.raises(nmconv.ModelTypeError):
        call(wrapped)


@pytest.mark.parametrize("call", [nmconv.merge, nmconv.find_runs, nmconv.fold_norms])
def test_distributed(tmp_path, call):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(nmconv.ModelTypeError):
            call(nn.parallel.DistributedDataParallel(original().float()))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("call", [nmconv.merge, nmconv.find_runs, nmconv.convert, nmconv.make_plan])
@pytest.mark.parametrize("examples", ["1,3,24,24", b"x", 224, (1, 3, 24, 24), {"x": "picture"}, ["a"]])
def test_example_inputs_that_are_none(model, call, examples):
    """Text, or a shape, is no input: said so before anything is touched."""
    before = snapshot(model)
    with pytest.raises(nmconv.OptionError, match="example_inputs"):
        call(model, example_inputs=examples)
    assert snapshot(model) == before


def test_nothing_to_merge_says_so():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()))
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(model)
    assert assert_agree(merged, model, (3, 9, 9))
    with pytest.warns(nmconv.NoEffectWarning):
        nmconv.merge(nn.Linear(3, 4).eval())


def test_merging_again(merged, model):
    again = merge(merged)
    assert assert_agree(again, model, *SHAPES)
    assert convs_of(again, 3, 24, 24) == 4
    assert counts(again, picture(3, 24, 24)).norms == 0


def test_outputs_move_no_more_than_the_dtype_allows():
    """In float32 merged and sequential differ by rounding, and not by more than sequential differs from the truth."""
    torch.manual_seed(0)
    truth = statistics(timm.create_model("mobilenetv2_050"))
    converted = nmconv.convert(truth, "3:1", relocate=True, hoist_padding=True, keep="boundary")
    single = copy.deepcopy(converted).float()
    merged = merge(single)
    x = picture(3, 64, 64, batch=2)
    with torch.no_grad():
        wanted = converted(x)
        assert_near(merged(x.float()).double(), wanted, 1e-4)
        assert next(merged.parameters()).dtype == torch.float32


def test_pickling_what_find_runs_says(model):
    runs = nmconv.find_runs(model)
    assert pickle.loads(pickle.dumps(runs)) == runs == copy.deepcopy(runs)
    assert hash(runs[0]) == hash(copy.deepcopy(runs[0]))
