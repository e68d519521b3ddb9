"""What a merge must see: sums with factors, sizes that decide, values kept, borders behind padding, underflow."""

import math
from collections import deque

import pytest
import torch
from torch import nn

import nmconv

pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings(
    "ignore::nmconv.NoEffectWarning", "ignore:.torch.jit.script. is deprecated:FutureWarning"
)


def picture(channels=4, size=9, batch=2, dtype=torch.float32):
    return torch.randn(batch, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def same(net, merged, *sizes, allowed=1e-9):
    """Outputs of both, in float64, at several sizes."""
    for size in sizes:
        x = picture(size=size, dtype=torch.float64)
        with torch.no_grad():
            one, two = net(x), merged(x)
        assert one.shape == two.shape and float((one - two).abs().max()) <= allowed * float(one.abs().max())


class Pair(nn.Module):
    """Two convolutions that would merge."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.b(self.between(self.a(x), x))

    def between(self, y, x):
        return y


def kind(name, between):
    return type(name, (Pair,), {"between": lambda self, y, x: between(y, x)})


# Sums


SUMS = {
    "alpha": lambda y, x: torch.add(0, y, alpha=2),
    "method with alpha": lambda y, x: y.add(0 * y, alpha=2),
    "reversed": lambda y, x: 0 + y,
    "function": lambda y, x: torch.add(0, y),
    "number with alpha": lambda y, x: torch.add(y, 0, alpha=3),
}


@pytest.mark.parametrize("case", SUMS)
def test_zero_plus_a_multiple(case):
    net = kind("Summed", SUMS[case])().double().eval()
    merged = nmconv.merge(net)
    same(net, merged, 5, 9)
    assert bool(nmconv.get_merges(merged)) is (case in ("reversed", "function"))


class Dead(nn.Module):
    """One sum is returned, one is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.b, self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        torch.relu(x + self.b(x))
        y = self.d(self.c(x))
        return y + torch.relu(y)


def test_a_sum_that_nobody_uses_is_left_alone():
    net = Dead().double().eval()
    merged = nmconv.merge(net, gate="always")
    same(net, merged, 5, 9)
    assert [merge.convs for merges in nmconv.get_merges(merged) for merge in merges] == [("c", "d")]


# Sizes that decide


SIZES = {
    "width": (lambda y, x: torch.relu(y) if x.shape[-1] < 8 else y, False),
    "width as a method": (lambda y, x: torch.relu(y) if x.size(3) < 8 else y, False),
    "of its own output": (lambda y, x: torch.relu(y) if y.shape[2] < 8 else y, False),
    "batch": (lambda y, x: y * 2 if x.size(0) > 4 else y, False),
    "all sizes": (lambda y, x: torch.relu(y) if x.shape[2:] != y.shape[2:] or x.numel() < 500 else y, False),
    "a number made of them": (lambda y, x: torch.relu(y) if int(x.shape[2] * x.shape[3]) < 64 else y, False),
    "channels": (lambda y, x: torch.relu(y) if x.shape[1] == 3 or x.size(1) == 5 else y, True),
    "axes": (lambda y, x: torch.relu(y) if x.dim() == 3 or x.ndim == 5 else y, True),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_forward_that_goes_by_sizes(case):
    between, merges = SIZES[case]
    net = kind("Sized", between)().double().eval()
    merged = nmconv.merge(net, example_inputs=picture(size=16, dtype=torch.float64))
    same(net, merged, 4, 6, 8, 16)
    x = picture(size=16, batch=6, dtype=torch.float64)
    assert torch.allclose(net(x), merged(x))
    assert bool(nmconv.get_merges(merged)) is merges


class Outer(nn.Module):
    """Hands a value from one block to the next, and goes by its size on the way."""

    def __init__(self, asks):
        super().__init__()
        self.one, self.two = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)), nn.Sequential(nn.Conv2d(8, 4, 3))
        self.asks = asks

    def forward(self, x):
        y = self.one(x)
        if self.asks and y.shape[-1] < 8:
            y = torch.relu(y)
        return self.two(y)


@pytest.mark.parametrize("asks", [False, True])
def test_only_what_lies_across_the_question_is_left(asks):
    net = Outer(asks).double().eval()
    merged = nmconv.merge(net, gate="always")
    same(net, merged, 5, 9)
    found = [merge.convs for merges in nmconv.get_merges(merged) for merge in merges]
    assert found == ([("one.0",)] if asks else [("one.0", "two.0")])  # the norm is folded all the same


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x):
        y = x + self.b(x)
        return y if x.shape[-1] < 8 else y + x


def test_a_sum_in_a_forward_that_goes_by_sizes_stays():
    net = Branching().double().eval()
    merged = nmconv.merge(net, gate="always", example_inputs=picture(size=16, dtype=torch.float64))
    same(net, merged, 5, 16)
    assert all(not merge.sums for merges in nmconv.get_merges(merged) for merge in merges)


# Values that are kept


class Holder:
    y = None


class Slots:
    __slots__ = ("y",)


@pytest.mark.parametrize("kept", [Holder, dict, list, deque, lambda: [deque()], lambda: {"x": Holder()}])
def test_a_value_that_is_kept_for_others(kept):
    def keep(net, y):
        target = net.kept
        while isinstance(target, (list, dict)) and target and not isinstance(next(iter(target)), torch.Tensor):
            inner = next(iter(target.values())) if isinstance(target, dict) else target[0]
            if isinstance(inner, (torch.Tensor, torch.fx.Proxy)):
                break
            target = inner
        if isinstance(target, dict):
            target["y"] = y
        elif isinstance(target, (list, deque)):
            target.append(y)
        else:
            target.y = y

    class Keeping(Pair):
        def forward(self, x):
            y = self.a(x)
            keep(self, y)
            return self.b(y)

    net = Keeping().eval()
    net.kept = kept()
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(net)
    x = picture()
    with torch.no_grad():
        assert torch.equal(merged(x), net(x))


# Borders behind padded maps


class Plus(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.branch = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.branch(x)


def conv(inputs, outputs, size, padding=0, bias=True):
    return nn.Conv2d(inputs, outputs, size, padding=padding, bias=bias)


NETS = {
    "biases end along one axis, zeros along the other": lambda: nn.Sequential(
        conv(4, 4, 1, (0, 1)), nn.ZeroPad2d((0, 0, 1, 1)), conv(4, 4, 3, (0, 1))
    ),
    "a border behind a padded 1x1": lambda: nn.Sequential(
        conv(4, 4, 1, 1, False), Plus(conv(4, 4, 1), conv(4, 4, 3, 1))
    ),
    "pre-activation behind a padded 1x1": lambda: nn.Sequential(
        conv(4, 4, 1, 1, False), Plus(nn.BatchNorm2d(4), conv(4, 4, 3, 1))
    ),
    "merged before": lambda: nn.Sequential(
        conv(4, 4, 1, 1, False),
        nmconv.merge(nn.Sequential(conv(4, 8, 1), conv(8, 4, 3, 1)).double().eval(), gate="always"),
    ),
    "a border behind padding": lambda: nn.Sequential(nn.ZeroPad2d(2), Plus(conv(4, 4, 1), conv(4, 4, 3, 1))),
    "one axis padded, the other with a border": lambda: nn.Sequential(
        conv(4, 4, 1, (1, 0), False), Plus(conv(4, 4, 1), conv(4, 4, (1, 3), (0, 1)))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NETS)
@pytest.mark.parametrize("live", [False, True])
def test_runs_are_exact_or_refused(case, live):
    torch.manual_seed(0)
    net = NETS[case]().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.bias)
    merged = nmconv.merge(net, gate="always", live=live)
    same(net, merged, 1, 2, 5, 8)
    for run in nmconv.find_runs(net):
        assert (
            run.exact == (case == "one axis padded, the other with a border")
            or "border" in run.why
            or "padded" in run.why
        )


# Numbers that the dtype does not hold


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e-4), (torch.float32, 1e-20), (torch.bfloat16, 1e-20)])
def test_merged_weights_that_would_vanish(dtype, scale):
    torch.manual_seed(0)
    net = nn.Sequential(conv(4, 4, 1, bias=False), conv(4, 4, 3, bias=False)).eval()
    for module in net:
        module.weight.data *= scale
    net.to(dtype)
    before = net[0].weight.clone()
    with pytest.raises(nmconv.MergeError, match=r"0 … 1: the merged weights are too small for torch\."):
        nmconv.merge(net, gate="always", inplace=True)
    assert torch.equal(net[0].weight, before) and isinstance(net[1], nn.Conv2d)
    net.double()
    same(net, nmconv.merge(net, gate="always"), 5)


def test_zeros_and_single_small_channels_are_no_error():
    torch.manual_seed(0)
    net = nn.Sequential(conv(4, 4, 1), nn.BatchNorm2d(4), conv(4, 4, 1)).eval()
    net[1].weight.data[0] = 1e-30
    net[2].weight.data[1] = 0
    merged = nmconv.merge(net.half(), gate="always")
    x = picture().half()
    with torch.no_grad():
        assert float((merged(x) - net(x)).abs().max()) < 1e-2
    nn.init.zeros_(net[2].weight)
    assert not nmconv.merge(net, gate="always")[0].weight.any()


# Parts that are something else


def test_scripted_and_lazy_parts_are_named():
    net = nn.Sequential(conv(4, 4, 1), torch.jit.script(nn.ReLU()), conv(4, 4, 1)).eval()
    for call in (nmconv.merge, nmconv.find_runs, nmconv.fold_norms, nmconv.convert):
        with pytest.raises(nmconv.ModelTypeError, match=r"'1' in the model is scripted"):
            call(net)
    lazy = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyConv2d(4, 3)).eval()
    for call in (nmconv.merge, nmconv.find_runs, nmconv.fold_norms):
        with pytest.raises(nmconv.ModelTypeError, match="run the model once first"):
            call(lazy)
    lazy(picture())
    lazy.double()
    same(lazy, nmconv.merge(lazy, gate="always"), 5)


def test_an_instance_norm_that_does_not_use_its_statistics():
    norm = nn.InstanceNorm2d(8, track_running_stats=True)
    net = nn.Sequential(conv(4, 8, 1), norm, conv(8, 4, 1), conv(4, 4, 3)).double().eval()
    norm.track_running_stats = False
    merged = nmconv.merge(net, gate="always")
    same(net, merged, 5)
    assert [merge.convs for merges in nmconv.get_merges(merged) for merge in merges] == [("2", "3")]
    norm.track_running_stats = True
    same(net, nmconv.merge(net, gate="always"), 5)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_norm_of_the_bias_is_a_hook_like_any_other():
    net = nn.Sequential(conv(4, 8, 1), conv(8, 4, 1)).eval()
    nn.utils.weight_norm(net[0], "bias", dim=None)
    with torch.no_grad():
        net[0].bias_g.mul_(3)
    with pytest.warns(nmconv.NoEffectWarning):
        merged = nmconv.merge(net)
    assert torch.equal(merged(picture()), net(picture()))
    assert "has a hook" in nmconv.find_runs(net)[0].why


def test_a_frozen_model_stays_frozen_when_it_is_loaded(tmp_path):
    def net():
        return nn.Sequential(conv(4, 8, 1), conv(8, 4, 3, 1), nn.Flatten(), nn.Linear(64, 2)).eval()

    x = torch.zeros(1, 4, 4, 4)
    nmconv.save(nmconv.merge(net(), gate="always", example_inputs=x), tmp_path / "a.safetensors")
    for trains in (False, True):
        loaded = nmconv.load(net().requires_grad_(trains), tmp_path / "a.safetensors", example_inputs=x)
        assert {value.requires_grad for value in loaded.parameters()} == {trains}
    part = net()
    part[1].requires_grad_(False)
    assert nmconv.load(part, tmp_path / "a.safetensors", example_inputs=x)[
        0
    ].weight.requires_grad  # one of its factors trains


def test_a_live_model_on_the_meta_device():
    net = nn.Sequential(conv(4, 8, 1), conv(8, 4, 3, 1)).eval()
    live = nmconv.merge(net, gate="always", live=True).to("meta")
    assert live(torch.empty(1, 4, 9, 9, device="meta")).shape == (1, 4, 9, 9)


@pytest.mark.parametrize("size", [16, 17])
def test_same_padding_goes_to_onnx_at_dynamic_sizes(size, tmp_path):
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    net = nn.Sequential(Conv2dSame(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
    merged = nmconv.merge(net, gate="always")
    sides = ({2: torch.export.Dim("h", min=8, max=256), 3: torch.export.Dim("w", min=8, max=256)},)
    program = torch.onnx.export(merged, (picture(size=size),), dynamo=True, verbose=False, dynamic_shapes=sides)
    program.save(tmp_path / "net.onnx")
    session = ort.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for other in (9, 16, 17, 22):
        x = picture(size=other)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        with torch.no_grad():
            assert float((torch.from_numpy(found) - net(x)).abs().max()) < 1e-5
    exported = torch.export.export(merged, (picture(size=size),), dynamic_shapes=sides).module()
    with torch.no_grad():
        assert float((exported(picture(size=11)) - net(picture(size=11))).abs().max()) < 1e-5


# Questions in every form


QUESTIONS = {
    "a bit": lambda net, x: x.shape[-1] & 1,
    "shifted": lambda net, x: x.shape[-1] >> 3 == 0,
    "a power": lambda net, x: x.shape[-1] ** 2 < 64,
    "a text": lambda net, x: str(x.shape[-1]) == "5",
    "formatted": lambda net, x: f"{x.shape[-1]:d}" == "5",
    "divmod": lambda net, x: divmod(x.shape[-1], 2)[1] == 1,
    "in": lambda net, x: x.shape[-1] in (5, 7),
    "a shape": lambda net, x: x.shape[2:] == (5, 5),
    "two sizes": lambda net, x: x.shape[2] != x.shape[3],
    "max": lambda net, x: max(x.shape[-1], x.shape[-2]) < 8,
    "a fraction": lambda net, x: x.shape[-1] / 8 < 1,
    "a whole number": lambda net, x: int(x.shape[-1] / 8) == 0,
    "numel": lambda net, x: x.numel() < 200,
    "size": lambda net, x: x.size(-1) < 8,
    "unpacked": lambda net, x: (lambda b, c, h, w: h * w < 64)(*x.shape),
    "sum": lambda net, x: sum(x.shape[2:]) < 16,
    "a root": lambda net, x: math.sqrt(x.shape[2] * x.shape[3]) < 8,
    "a logarithm": lambda net, x: math.log2(x.shape[-1]) < 3,
    "len": lambda net, x: len(x[0, 0]) < 8,
    "the batch": lambda net, x: len(x) == 1,
    "the batch by shape": lambda net, x: x.shape[0] == 1,
    "ceil": lambda net, x: math.ceil(x.shape[-1] / 8) == 1,
    "an attribute": lambda net, x: x.shape[-1] < net.limit,
    "odd": lambda net, x: x.shape[-1] % 2 != 0,
    "all": lambda net, x: all(size < 8 for size in x.shape[2:]),
    "prod": lambda net, x: math.prod(x.shape[2:]) < 64,
    "stride": lambda net, x: x.stride(2) < 8,
    "a tensor": lambda net, x: torch.tensor(x.shape[-1]) < 8,
    "bits": lambda net, x: x.shape[-1].bit_length() < 4,
    "a key": lambda net, x: {5: True}.get(x.shape[-1], False),
    "bytes": lambda net, x: x.nbytes < 1000,
    "a range": lambda net, x: list(range(x.shape[-1]))[-1] < 7,
    "negative": lambda net, x: -x.shape[-1] > -8,
    "between": lambda net, x: 4 < x.shape[-1] < 8,
    "of another tensor": lambda net, x: torch.arange(x.shape[-1]).shape[0] < 8,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_about_sizes_in_any_form(question):
    """It is asked before the first of two convolutions, and answered between them; no recording is of a small size."""

    class Asking(Pair):
        limit = 8

        def forward(self, x):
            small = QUESTIONS[question](self, x)
            y = self.a(x)
            if small:
                y = torch.relu(y)
            return self.b(y)

    net = Asking().double().eval()
    merged = nmconv.merge(net, gate="always", example_inputs=picture(size=16, dtype=torch.float64))
    for size in ((5, 5), (5, 7), (7, 5), (9, 9), (15, 15), (16, 16)):
        for batch in (1, 2, 3):
            x = torch.randn(batch, 4, *size, dtype=torch.float64)
            with torch.no_grad():
                assert float((merged(x) - net(x)).abs().max()) < 1e-9
    assert not any(len(merge.convs) > 1 for merges in nmconv.get_merges(merged) for merge in merges)
