"""The witness: results that are right pass, results that somebody has tampered with do not, and the model is left."""

import copy
import threading

import pytest
import torch
from torch import nn

import nmconv

X = torch.rand(2, 3, 16, 16)


class Block(nn.Module):
    """Two convolutions with norms and one shared ReLU around a sum."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Net(nn.Module):
    """A stem, two blocks and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(8, 8, 1), nn.LeakyReLU(0.1), nn.Conv2d(8, 5, 1))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x))).mean((2, 3))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"relocate": True}, {"hoist_padding": True}, {"keep": "boundary"}, {"relocate": True, "hoist_padding": True}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::nmconv.NoEffectWarning")  # where paddings stay, nothing merges
def test_conversions_and_merges_pass(net, options, tmp_path):
    made = nmconv.convert(net, "2:1", example_inputs=X, **options)
    nmconv.verify(net, made, X)
    merged = nmconv.merge(made, gate="always", example_inputs=X)
    nmconv.verify(made, merged, X)
    nmconv.verify(net, merged, X)
    nmconv.save(merged, tmp_path / "net.safetensors")
    nmconv.verify(net, nmconv.load(Net().eval(), tmp_path / "net.safetensors", example_inputs=X), X)


@pytest.mark.parametrize("kernel", [None, "exact", 3])
def test_fits_pass(net, kernel):
    made = nmconv.convert(net, "2:1")
    fitted = nmconv.fit(made, torch.rand(8, 3, 16, 16), reference=net, kernel=kernel)
    nmconv.verify(made, fitted, X)
    nmconv.verify(net, fitted, X)
    with pytest.raises(nmconv.PlanError, match="another plan"):
        nmconv.verify(nmconv.convert(net, "3:1"), fitted, X)
    with pytest.raises(nmconv.PlanError, match="pass the model that result was made from"):
        nmconv.verify(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), made, X)


# -- tampering: what the witness must not let pass --------------------------------------------------------------------


def other_slope(model):
    model.head[2].negative_slope = 0.2


def one_more_dropped(model):
    model.head[2] = nn.Identity()


def one_put_back(model):
    model.blocks[0].relu = nn.Sequential(nn.ReLU(), nn.ReLU())


def norm_gone(model):
    model.stem[1] = nn.Identity()


def other_stride(model):
    model.blocks[1].conv2.dilation = (2, 2)
    model.blocks[1].conv2.padding = (2, 2)


def two_exchanged(model):
    model.blocks[0], model.blocks[1] = model.blocks[1], nn.Sequential(model.blocks[0])


def no_dropout(model):
    model.head[0] = nn.Identity()


def another_probability(model):
    model.head[0].p = 0.2


def other_constant(model):
    forward = model.forward
    model.forward = lambda x: forward(x) * 2


def other_axis(model):
    model.forward = lambda x: model.head(model.blocks(model.stem(x))).mean((3, 2))


def without_gradients(model):
    stem = model.stem.forward

    def forward(x):
        with torch.no_grad():
            return stem(x)

    model.stem.forward = forward


def other_in_train_mode(model):
    forward = model.forward
    model.forward = lambda x: forward(x) + 1 if model.training else forward(x)


def other_at_large_sizes(model):
    forward = model.forward
    model.forward = lambda x: forward(x) + 1 if x.shape[-1] > 32 else forward(x)


def returns_more(model):
    forward = model.forward
    model.forward = lambda x: (forward(x), x)


def counts(model):
    model.register_buffer("calls", torch.zeros(()))
    forward = model.forward

    def counted(x):
        model.calls += 1
        return forward(x)

    model.forward = counted


def keeps_features(model):
    stem = model.stem.forward

    def forward(x):
        model.kept = stem(x)
        return model.kept

    model.stem.forward = forward


TAMPERING = (
    other_slope, one_more_dropped, one_put_back, norm_gone, other_stride, two_exchanged, no_dropout,
    another_probability, other_constant, other_axis, without_gradients, other_in_train_mode,
    other_at_large_sizes, returns_more, counts, keeps_features,
)  # fmt: skip


@pytest.mark.parametrize("tamper", TAMPERING, ids=lambda tamper: tamper.__name__)
def test_what_was_tampered_with_does_not_pass(net, tamper):
    made = nmconv.convert(net, "2:1", example_inputs=X)
    tamper(made)
    with pytest.raises(nmconv.WitnessError):
        nmconv.verify(net, made, X)


def test_an_identity_that_does_not_copy_does_not_pass():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.r, self.b, self.s = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x):
            y = self.a(x)
            part = y[:, :1]
            z = self.r(y)
            part.mul_(2)
            return self.s(self.b(z))

    net = Overwrites()
    plan = nmconv.make_plan(net, "2:1").edit({"r#1": "drop"})
    made = nmconv.apply_plan(net, plan, example_inputs=X)
    nmconv.verify(net, made, X)
    made.r = nn.Identity()
    with pytest.raises(nmconv.WitnessError):
        nmconv.verify(net, made, X)


def test_a_merge_beyond_what_was_merged_does_not_pass(net):
    made = nmconv.convert(net, "2:1", example_inputs=X, hoist_padding=True, keep="boundary")
    merged = nmconv.merge(made, gate="always", example_inputs=X)
    merged.head[2] = nn.Identity()
    with pytest.raises(nmconv.WitnessError, match=r"head\.2") as caught:
        nmconv.verify(made, merged, X)
    assert "witness=False" not in str(caught.value) and "exclude" not in str(caught.value)  # verify has no such options


# -- errors -----------------------------------------------------------------------------------------------------------


class Counts(nn.Module):
    """Divides by the number of ReLUs that it has met."""

    def __init__(self, when="always"):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
        self.when = when

    def forward(self, x):
        met = 0
        for module in self.f:
            x = module(x)
            met += isinstance(module, nn.ReLU)
        return x / met if self.when == "always" or self.training else x


@pytest.mark.parametrize("when", ["always", "train"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_forward_that_counts_activations_is_named_and_left(when, inplace):
    net = Counts(when)
    before = copy.deepcopy(net)
    parts = dict(net.named_modules())
    with pytest.raises(nmconv.WitnessError, match=r"div\(tensor, 2\).*exclude.*witness=False") as caught:
        nmconv.convert(net, "2:1", example_inputs=X, inplace=inplace)
    assert caught.value.module == ""
    assert caught.value.first == "div(tensor, 2)"
    assert caught.value.second == "div(tensor, 1)"
    assert dict(net.named_modules()) == parts
    assert all(torch.equal(one, other) for one, other in zip(before.parameters(), net.parameters(), strict=True))
    assert nmconv.get_plan(net) is None
    assert torch.equal(net(X), before(X))
    made = nmconv.convert(net, "2:1", example_inputs=X, witness=False)
    assert len(nmconv.get_plan(made).changes) == 1


def test_a_model_that_runs_otherwise_each_time_is_told_apart():
    class Toggles(nn.Module):
        times = 0

        def __init__(self):
            super().__init__()
            self.a, self.r, self.b, self.s = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x):
            Toggles.times += 1
            return self.s(self.b(self.r(self.a(x)))) * (Toggles.times % 7)

    with pytest.raises(nmconv.WitnessError, match="runs differently each time it is called"):
        nmconv.convert(Toggles(), "2:1", example_inputs=X)


def test_a_result_that_cannot_be_called_says_what_it_raises(net):
    made = nmconv.convert(net, "2:1", example_inputs=X)
    made.head[1] = nn.Conv2d(7, 8, 1)
    with pytest.raises(nmconv.WitnessError, match="it raises RuntimeError"):
        nmconv.verify(net, made, X)


def test_errors_survive_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(nmconv.WitnessError("text", "a.b", "one", "two")))
    assert (str(error), error.module, error.first, error.second) == ("text", "a.b", "one", "two")


def test_a_lock_is_shared_by_copies():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()
            self.f = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU())

        def forward(self, x):
            with self.lock:
                return self.f(x)

    net = Locked()
    made = nmconv.convert(net, "2:1", example_inputs=X, keep="boundary")
    assert made.lock is net.lock
    assert torch.equal(made(X), net.f[3](net.f[2](net.f[0](X))))


def test_what_a_hook_sees_stays():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.r, self.b = nn.Conv2d(3, 3, 1), nn.Identity(), nn.Conv2d(3, 3, 1)
            self.seen = None
            self.r.register_forward_hook(self.see)

        def see(self, module, args, output):
            self.seen = output

        def forward(self, x):
            y = self.b(self.r(self.a(x)))
            return y if self.seen is None else torch.cat([y, self.seen], 1)

    net = Kept().eval()
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(net, gate="always", example_inputs=X)
    expected = torch.cat([net.b(net.a(X)), net.a(X)], 1)
    assert torch.equal(merged(X), expected)
    assert not any(run.exact for run in nmconv.find_runs(net, example_inputs=X))


def test_a_hook_on_a_dropped_activation_goes_on_seeing_its_input():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU())
    seen = []
    net[1].register_forward_hook(lambda module, args, output: seen.append(output))
    made = nmconv.convert(net, "2:1", example_inputs=X, keep="boundary")
    assert seen == []
    made(X)
    assert torch.equal(seen[0], net[0](X))


# -- views of what is written in place --------------------------------------------------------------------------------


class Viewed(nn.Module):
    """Adds, activates, and reads parts of the result, which may all be one memory."""

    def __init__(self, add, act, part):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(channels, 4, 3, padding=1) for channels in (4, 4, 2))
        self.relu, self.act = nn.ReLU(), act
        self.add, self.part = add, part

    def forward(self, x):
        y = self.conv2(self.relu(self.conv1(x)))
        y = self.add(y, x)
        return self.conv3(self.part(self.act(y)))


ADDS = {"in place": torch.Tensor.add_, "anew": torch.add, "none": lambda y, x: y}
PARTS = {
    "split": lambda y: y.split(2, 1)[0],
    "chunk": lambda y: y.chunk(2, 1)[1],
    "slice": lambda y: y[:, :2],
    "view of a view": lambda y: y.view(-1, 2, 2, *y.shape[2:])[:, 1],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)
def test_a_view_of_what_was_written_before_it(add, inplace, part):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    model = Viewed(add, nn.LeakyReLU(inplace=inplace), part)
    made = nmconv.convert(model, "2:1", example_inputs=x)
    assert [site.id for site in nmconv.get_plan(made).changes] == ["act#1"]
    by_hand = Viewed(add, nn.Identity(), part)
    by_hand.load_state_dict(model.state_dict())
    assert torch.equal(made(x), by_hand(x)) and not torch.equal(made(x), model(x))


def test_a_view_of_what_was_written_after_it_is_another_value():
    """Both read the same memory at the end; a copy of the part does not."""
    x = torch.randn(2, 4, 6, 6)

    class Before(Viewed):
        def forward(self, x):
            y = self.conv2(self.relu(self.conv1(x)))
            part = self.part(y)
            return self.act(self.add(y, x)), self.conv3(part)

    model = Before(torch.Tensor.add_, nn.LeakyReLU(), PARTS["slice"])
    plan = nmconv.make_plan(model, "1:1", example_inputs=x).edit({"relu#1": "drop"})
    made = nmconv.apply_plan(model, plan, example_inputs=x)
    nmconv.verify(model, made, x)
    made.part = lambda y: y[:, :2].clone()
    with pytest.raises(nmconv.WitnessError):
        nmconv.verify(model, made, x)
