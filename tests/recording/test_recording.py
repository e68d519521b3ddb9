"""The recording of a model's own run: what it notes, what it answers, and that the model is not entered."""

import gc
import random
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nmconv
from nmconv.flow import record_model
from nmconv.recording.nodes import NodeBuilder

X = torch.rand(2, 4, 16, 16)
conv = partial(nn.Conv2d, 4, 4, 3, padding=1)


class Net(nn.Module):
    """Two convolutions, a ReLU, a norm and a forward of the test's own."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.a, self.b, self.r, self.n = conv(), conv(), nn.ReLU(), nn.BatchNorm2d(4)
        for name, value in parts.items():
            setattr(self, name, value)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def asks(x):
    return x if torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") else x * 2


def runs(model, x=X):
    return {run.call.name: run for run in record_model(model, x).runs}


def labels(run):
    return [fact.label for node, fact in run.facts.items() if node.op.startswith("call")]


def test_leaves_functions_and_methods_are_nodes_in_the_order_of_execution():
    run = runs(Net(lambda s, x: F.relu(s.n(s.a(x))).mul(2) + s.b(x)))["eval"]
    assert labels(run) == ["a", "n", "relu", "mul", "b", "add"]
    assert [node.op for node in run.graph.nodes][-1] == "output"
    assert all(fact.frame.path == "" for fact in run.facts.values())


def test_both_modes_and_a_second_size_and_batch_are_recorded():
    found = runs(Net(lambda s, x: s.b(s.a(x))))
    assert list(found) == ["eval", "train", "eval, other size", "train, other size"]
    shapes = {name: next(iter(run.facts.values())).form[2][0] for name, run in found.items()}
    assert shapes["eval"] == (2, 4, 16, 16)
    assert shapes["eval, other size"] == (3, 4, 48, 48)


def test_a_model_of_one_size_is_recorded_with_another_batch():
    found = runs(Net(lambda s, x: s.b(s.a(x) + s.table), table=nn.Parameter(torch.zeros(16, 16))))
    assert list(found) == ["eval", "train", "eval, other batch", "train, other batch"]


def test_grad_mode_and_autocast_are_recorded_where_a_helper_asks_for_them():
    found = runs(Net(lambda s, x: s.b(asks(s.a(x)))))
    assert labels(found["eval"]) == ["a", "b"]
    assert labels(found["eval, no_grad"]) == labels(found["eval, autocast"]) == ["a", "mul", "b"]


def test_each_tensor_has_the_last_write_to_its_memory():
    def forward(s, x):
        y = s.a(x)
        y[:, :2].relu_()
        return s.b(y)

    run = runs(Net(forward))["eval"]
    fact = next(fact for fact in run.facts.values() if fact.label == "b")
    (made, writer), *_ = fact.reads
    assert run.facts[made].label == "a"
    assert run.facts[writer].label == "relu_"


def test_questions_about_the_device_get_the_models_device():
    def forward(s, x):
        y = s.a(x) + torch.arange(x.shape[-1], device=x.device) + torch.ones(1, device="cpu")
        with torch.autocast(x.device.type, enabled=False):
            return s.b(y) if x.device.type == "cpu" and x.is_cpu and not x.is_meta else y

    assert labels(runs(Net(forward))["eval"])[-1] == "b"


def test_buffers_that_nothing_has_written_to_answer_with_the_models_values():
    def forward(s, x):
        if s.training:
            s.steps += 1
        return s.b(s.a(x) * s.factor.item()) if s.on else s.a(x)

    model = Net(forward)
    model.register_buffer("factor", torch.tensor(2.5))
    model.register_buffer("on", torch.tensor(True))
    model.register_buffer("steps", torch.zeros((), dtype=torch.long))
    found = runs(model)
    assert labels(found["eval"]) == ["a", "mul", "b"]
    assert any("2.5" in str(fact.form) for fact in found["eval"].facts.values() if fact.label == "mul")
    assert "steps" in found["train"].written
    assert "steps" not in found["eval"].written
    assert int(model.steps) == 0


def test_where_data_decide_one_real_run_tells_and_the_places_are_noted():
    def forward(s, x):
        y = s.a(x)
        if x.mean() > 9:
            y = y * 2
        return s.b(y[:, :, :1][x[:, :, :1] > -1].view_as(y[:, :, :1]))

    run = runs(Net(forward))["eval"]
    assert ("__bool__", "") in run.data_dependent_calls
    assert labels(run)[:3] == ["a", "mean", "gt"]
    big = runs(Net(forward), X + 10)["eval"]
    assert "mul" in labels(big)


def test_a_part_that_runs_in_one_mode_only_is_recorded_alone_in_the_other():
    def forward(s, x):
        if s.training:
            raise ValueError("it takes targets in train mode")
        return s.block(s.a(x))

    model = Net(forward, block=nn.Sequential(conv(), nn.ReLU(), nn.Dropout(0.5)))
    found = record_model(model, X)
    alone = next(run for run in found.runs if run.call.training)
    assert alone.path == "block"
    assert labels(alone) == ["block.0", "block.1", "block.2"]
    with pytest.raises(nmconv.OptionError, match=r"cannot be called with example_inputs.*it takes targets"):
        record_model(Net(lambda s, x: forward(s.train(), x)), X)


def test_a_guess_that_does_not_fit_names_example_inputs_and_is_quiet(capfd):
    with pytest.raises(nmconv.OptionError, match=r"guessed input of .*224.*pass example_inputs"):
        record_model(Net(lambda s, x: s.a(x.view(1, 4, 10, 10))))
    assert capfd.readouterr() == ("", "")


# -- the model is not entered -----------------------------------------------------------------------------------------


def test_the_model_is_as_it_was_and_chance_too():
    def forward(s, x):
        s.calls += 1
        s.cache[x.shape] = x
        s.last = y = s.n(s.a(x)) * random.random() * float(np.random.rand())
        return s.b(F.dropout(y, 0.5, s.training))

    model = Net(forward, calls=0, cache={}, last=None, lock=threading.Lock(), chance=torch.Generator())
    model.train()
    model.b.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy(), model.chance.get_state()
    record_model(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, module in model.named_modules():
        assert all(vars(module)[key] is value for key, value in attributes[name].items())
        assert vars(module).keys() == attributes[name].keys()
    assert model.cache == {}
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()
    assert torch.equal(model.chance.get_state(), states[3])


def test_closures_and_hooks_are_bound_to_the_copy():
    seen = []
    model = Net(lambda s, x: s.b(s.function(x)) + seen[-1])
    model.function = lambda x: model.a(x)
    model.a.register_forward_hook(lambda module, args, output: seen.append(output))
    model._forward = lambda s, x: s.b(s.function(x))
    run = runs(model)["eval"]
    assert labels(run) == ["a", "a hook on a", "b"]
    assert seen == []


def test_classes_whose_copies_are_none_are_converted_in_place():
    class Same(Net):
        def __deepcopy__(self, memo):
            return self

    class Anew(Net):
        def __deepcopy__(self, memo):
            return type(self)(self._forward)

    class Numbers(Net):
        def __deepcopy__(self, memo):
            return type(self)(self._forward, act=nn.ReLU())

    class Raises(Net):
        def __deepcopy__(self, memo):
            raise TypeError("there is one of it")

    texts = {
        Same: "shares everything",
        Anew: "has another structure than the model",
        Numbers: "has other values in 'a.weight'",
        Raises: r"cannot be copied \(TypeError: there is one of it\)",
    }
    for cls, text in texts.items():
        model = cls(lambda s, x: s.act(s.b(s.r(s.a(x)))))
        model.act = nn.ReLU()
        assert labels(runs(model)["eval"]) == ["a", "r", "b", "act"]
        with pytest.raises(nmconv.ModelTypeError, match=f"{text}.*pass inplace=True"):
            nmconv.convert(model, "2:1", example_inputs=X, keep="boundary")
        expected = model.act(model.b(model.a(X)))
        assert nmconv.convert(model, "2:1", example_inputs=X, inplace=True, keep="boundary") is model
        assert torch.equal(model(X), expected)


def test_a_forward_that_reaches_the_model_itself_is_refused_by_name():
    model = Net(lambda s, x: s.b(s.a(x)))
    kept = [model]
    type(model).reach = staticmethod(lambda: kept[0])  # a class is no part of a copy
    model._forward = lambda s, x: F.conv2d(s.a(x), s.reach().b.weight)
    try:
        with pytest.raises(nmconv.ModelTypeError, match=r"reaches 'b.weight' of the model itself"):
            record_model(model, X)
    finally:
        del type(model).reach


def test_a_fault_of_the_recorder_is_ours(monkeypatch):
    def fails(*_, **__):
        raise IndexError("a slip")

    model = Net(lambda s, x: s.b(s.a(x)))
    monkeypatch.setattr(NodeBuilder, "set_result", fails)
    with pytest.raises(nmconv.InternalError, match=r"bug in nmconv, please report: .*IndexError: a slip"):
        record_model(model, X)
    model._forward = lambda s, x: quietly(s, x)

    def quietly(s, x):
        try:
            return s.a(x)
        except Exception:
            return x

    with pytest.raises(nmconv.InternalError, match="a slip"):
        record_model(model, X)


def test_no_tensor_outlives_a_recording():
    gc.collect()
    before = {id(value) for value in gc.get_objects() if type(value) is torch.Tensor}
    found = record_model(Net(lambda s, x: s.b(s.r(s.n(s.a(x))))), X)
    gc.collect()
    left = [value for value in gc.get_objects() if type(value) is torch.Tensor and id(value) not in before]
    assert not [value for value in left if value.is_meta]
    assert found.runs


def test_the_copy_is_freed():
    model = Net(lambda s, x: s.b(s.a(x)))
    reached = []
    model._forward = lambda s, x: (reached.append(weakref.ref(s)), s.b(s.a(x)))[1]
    held = reached
    model._forward.__kwdefaults__ = None
    found = record_model(model, X)
    gc.collect()
    assert all(reference() is None or reference() is model for reference in held)
    assert found.runs


def test_other_threads_see_nothing_of_a_recording():
    torch.manual_seed(0)
    frozen = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv()).eval()
    x = torch.rand(2, 4, 8, 8)

    def inference():
        with torch.no_grad():
            return frozen(x)

    def cast():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return frozen(x)

    def training():
        net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv())
        with torch.no_grad():
            for at, value in enumerate(net.parameters()):
                value.fill_(0.01 * (at + 1))
        for _ in range(2):
            net(x).square().mean().backward()
            with torch.no_grad():
                for value in net.parameters():
                    value -= 0.1 * value.grad
        return torch.cat([value.flatten() for value in (*net.parameters(), net[1].running_mean)])

    jobs = (inference, cast, training)
    wanted = [job() for job in jobs]
    assert not wanted[0].requires_grad
    stop, wrong = threading.Event(), []

    def work(job, expected):
        while not stop.is_set():
            found = job()
            if not torch.equal(found, expected) or found.requires_grad != expected.requires_grad:
                wrong.append(job.__name__)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    model = Net(lambda s, x: s.b(F.dropout(s.r(s.n(s.a(x))), 0.5, s.training)))
    try:
        for _ in range(10):
            record_model(model, X)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


class Recurrent(nn.Module):
    """Columns of a picture as a sequence, with the sizes of all that a recurrent layer gives written down."""

    def __init__(self, cls, batch_first=False, **options):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.rnn = cls(4, 6, batch_first=batch_first, **options)
        self.batch_first = batch_first
        self.sizes = []

    def forward(self, x):
        y = self.cnn(x).mean(2).permute(0, 2, 1)
        y = y if self.batch_first else y.transpose(0, 1)
        y, states = self.rnn(y)
        states = states if isinstance(states, tuple) else (states,)
        sizes = [tuple(each.shape) for each in (y, *states)]
        if not self.sizes:
            self.sizes += sizes
        assert sizes == self.sizes, (sizes, self.sizes)
        return y.mean() + sum(state.mean() for state in states)


@pytest.mark.parametrize(
    "cls, options",
    [
        (nn.LSTM, {"bidirectional": True}),
        (nn.LSTM, {"num_layers": 2, "batch_first": True}),
        (nn.LSTM, {"proj_size": 3, "bidirectional": True}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True}),
        (nn.RNN, {"batch_first": True}),
        (nn.RNN, {"nonlinearity": "relu"}),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers_give_tensors_of_their_sizes(cls, options):
    model, x = Recurrent(cls, **options), torch.randn(2, 3, 5, 8)
    model(x)  # really
    assert nmconv.get_plan(nmconv.convert(model, "2:1", example_inputs=x)).counts.activations_after == 1
