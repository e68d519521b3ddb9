"""Where merged models go: ONNX Runtime at sizes of its choice, torch.export, torchao's int8."""

import warnings

import pytest
import torch
from torch import nn

import nmconv


class Net(nn.Module):
    """A 1x1 with a shift before a padded 3x3 (a border term), a residual sum, and a lone convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 8, 3, 2, 1), nn.ReLU())
        self.wide = nn.Conv2d(8, 48, 1)
        self.norm = nn.BatchNorm2d(48)
        self.depth = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.narrow = nn.Conv2d(48, 8, 1)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.narrow(self.depth(self.norm(self.wide(x)))))
        return self.last(x).mean((2, 3))


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    net = Net().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias)
    fast = nmconv.merge(net, gate="always")
    assert sum(isinstance(module, nn.modules.conv._ConvNd) for module in fast.modules()) == 3
    assert sum(getattr(module, "border", None) is not None for module in fast.modules()) == 2
    return net, fast


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def shapes():
    batch, height, width = (
        torch.export.Dim(name, min=8 if name != "batch" else 2, max=512) for name in ("batch", "height", "width")
    )
    return ({0: batch, 2: height, 3: width},)


def test_onnxruntime_at_any_batch_and_size(nets, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, fast = nets
    path = str(tmp_path / "fast.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(fast, (torch.randn(2, 3, 24, 24),), path, dynamo=True, dynamic_shapes=shapes(), verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for shape in ((2, 3, 24, 24), (5, 3, 17, 30), (3, 3, 33, 9)):
        x = torch.randn(shape)
        with torch.no_grad():
            close(torch.from_numpy(session.run(None, {name: x.numpy()})[0]), net(x))


def test_onnxruntime_at_a_fixed_size_has_nothing_left_of_the_border(nets, tmp_path):
    """The border's map is a constant there: one convolution a merged run, no kernel over a map of ones."""
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    net, fast = nets
    path, folded = str(tmp_path / "fast.onnx"), str(tmp_path / "folded.onnx")
    x = torch.randn(1, 3, 20, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(fast, (x,), path, dynamo=True, verbose=False)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = folded
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), net(x))
    assert sum(node.op_type == "Conv" for node in onnx.load(folded).graph.node) == 3


class Dense(nn.Module):
    """A layer of a DenseNet: what it makes goes beside what it was given."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layer = nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 16, 3, padding=1))
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Conv2d(32, 16, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.norm(torch.cat([x, self.layer(x)], 1)).relu())


def test_onnxruntime_keeps_its_layout_behind_a_border(tmp_path):
    """No norm, activation or concatenation that was computed in the blocked layout falls out of it by merging."""
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = Dense().eval()
    nn.init.normal_(net.layer[1].bias)
    x = torch.randn(1, 3, 20, 20)
    found = {}
    for name, model in (("before", nmconv.fold_norms(net)), ("after", nmconv.merge(net))):
        path, optimized = str(tmp_path / f"{name}.onnx"), str(tmp_path / f"{name}.opt.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        options = runtime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = optimized, 3
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), net(x))
        found[name] = [node.op_type for node in onnx.load(optimized).graph.node]
    assert found["before"].count("Conv") - found["after"].count("Conv") == 1
    assert found["after"].count("Add") == 1
    plain = {"BatchNormalization", "Relu"}
    assert plain.isdisjoint(found["after"]) or not plain.isdisjoint(found["before"]), found


def test_export_at_any_batch_and_size(nets):
    net, fast = nets
    program = torch.export.export(fast, (torch.randn(2, 3, 24, 24),), dynamic_shapes=shapes())
    x = torch.randn(4, 3, 19, 26)
    with torch.no_grad():
        close(program.module()(x), net(x))


def test_int8_by_torchao(nets):
    pytest.importorskip("torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        net, fast = nets
        torch.manual_seed(0)
        x = torch.randn(8, 3, 24, 24)
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(fast, (x,)).module(), quantizer)
        prepared(x)
        quantised = convert_pt2e(prepared)
        with torch.no_grad():
            expected, found = net(x), quantised(x)
    text = str(quantised.graph)
    assert text.count("quantize_per_channel") >= 3  # every convolution's weight
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1


class Amplifier(nn.Module):
    """Makes a hundredth of what float32 rounds off."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return torch.sin(3e4 * self.b(self.a(x)))


def test_a_network_that_amplifies_rounding_is_judged_by_its_own():
    torch.manual_seed(0)
    net, x = Amplifier().eval(), torch.randn(2, 3, 32, 32)
    fast = nmconv.merge(net, example_inputs=x)
    with torch.no_grad():
        assert (fast(x) - net(x)).abs().max() > 1e-3 * net(x).abs().max()  # more than is usual


@pytest.mark.parametrize("inplace", [False, True])
def test_a_merge_that_goes_wrong_is_seen_and_undone(monkeypatch, inplace):
    from nmconv.merging import merger

    right = merger.conv_from_affine

    def wrong(affine, like, requires_grad):
        module = right(affine, like, requires_grad)
        module.weight.data.mul_(1.02)
        return module

    monkeypatch.setattr(merger, "conv_from_affine", wrong)
    torch.manual_seed(0)
    for net in (Amplifier().eval(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).eval()):
        modules, state = list(net.modules()), {key: value.clone() for key, value in net.state_dict().items()}
        with pytest.raises(nmconv.MergeError, match="on the example inputs"):
            nmconv.merge(net, example_inputs=100 * torch.randn(2, 3, 8, 8), inplace=inplace)
        assert list(net.modules()) == modules
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        assert nmconv.get_merges(net) == ()
