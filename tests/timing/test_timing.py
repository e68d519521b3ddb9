"""The timing wing: runners that compute what the module computes, and times that can be trusted."""

import gc
import statistics
import sys
import time
import warnings
import weakref

import pytest
import torch
from torch import nn

from nmconv.errors import OptionError
from nmconv.timing import (
    BACKENDS,
    Spread,
    Timing,
    check_backend,
    fixed_normal,
    make_runner,
    quotients,
    thread_count,
    time_interleaved,
)


class TwoInTwoOut(nn.Module):
    """Two arguments, a dict of two results, one of them no contiguous tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, y):
        return {"sum": self.conv(x) + self.conv(y), "turned": self.conv(x).transpose(1, 2)}


def small(channels=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU()).eval()


def leaves(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_runner_computes_what_the_module_computes(backend):
    torch.manual_seed(0)
    module = TwoInTwoOut().eval()
    x, y = torch.randn(2, 3, 9, 7), torch.randn(2, 3, 7, 9).transpose(2, 3)
    found = leaves(make_runner(module, (x, y), backend)())
    wanted = leaves(module(x, y))
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, two.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_bound_memory_has_the_modules_dtype(dtype):
    module, x = nn.Sequential(nn.Linear(5, 3), nn.ReLU()).to(dtype), torch.randn(2, 5).to(dtype)
    (found,) = make_runner(module, (x,), "onnxruntime")()
    assert found.dtype == dtype
    torch.testing.assert_close(found, module(x).detach(), rtol=1e-2, atol=1e-2)


def test_inputs_are_bound_not_copied():
    x = torch.randn(1, 3, 8, 8)
    module = small()
    run = make_runner(module, (x,), "onnxruntime")
    before = run()[0].clone()
    x.add_(1)
    torch.testing.assert_close(run()[0], module(x).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, run()[0])


def test_runners_outlive_their_inputs():
    module = small()
    run = make_runner(module, (torch.ones(1, 3, 64, 64),), "onnxruntime")
    junk = [torch.full((1, 3, 64, 64), float("nan")) for _ in range(8)]
    torch.testing.assert_close(run()[0], module(torch.ones(1, 3, 64, 64)).detach(), rtol=1e-5, atol=1e-5)
    assert junk


def test_many_modules_compile_each_for_its_own_shape():
    graphs = []

    def backend(graph, inputs):
        graphs.append([tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)])
        return graph.forward

    compiling = torch.compile
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=1):
        patch.setattr(torch, "compile", lambda f, **options: compiling(f, backend=backend, **options))
        for size in range(5, 10):
            make_runner(small(size), (torch.randn(1, 3, size, size),), "compile")
    assert len(graphs) == 5
    assert all((1, 3, size, size) in shapes for size, shapes in zip(range(5, 10), graphs, strict=True))


def test_no_warning_and_no_output_of_the_exporter(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_runner(small(), (torch.randn(1, 3, 8, 8),), "onnxruntime")
    assert capfd.readouterr() == ("", "")


def test_sessions_take_torchs_number_of_threads(monkeypatch):
    import onnxruntime

    seen = []
    session = onnxruntime.InferenceSession

    def spy(path, options, **kwargs):
        seen.append((options.intra_op_num_threads, options.inter_op_num_threads, kwargs["providers"]))
        return session(path, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    with thread_count(2):
        make_runner(small(), (torch.randn(1, 3, 8, 8),), "onnxruntime")
    make_runner(small(), (torch.randn(1, 3, 8, 8),), "onnxruntime")
    assert seen == [(2, 1, ["CPUExecutionProvider"]), (1, 1, ["CPUExecutionProvider"])]


def test_unknown_backend():
    with pytest.raises(OptionError, match=r"'tensorrt'.*eager, compile, frozen, onnxruntime"):
        make_runner(small(), (torch.randn(1, 3, 8, 8),), "tensorrt")


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
def test_missing_package(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OptionError, match=rf"'onnxruntime': {package} is not installed: pip install 'nmconv\[onnx\]'"):
        make_runner(small(), (torch.randn(1, 3, 8, 8),), "onnxruntime")
    check_backend("eager")
    check_backend("compile")


@pytest.mark.parametrize("backend, kept", [("eager", False), ("compile", False), ("frozen", True)])
def test_only_freezing_keeps_weights(backend, kept):
    module, x = small(), torch.randn(1, 3, 8, 8)
    run = make_runner(module, (x,), backend)
    before = run().clone()
    with torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(run(), before) == kept
    assert torch.equal(run(), module(x)) != kept
    assert not torch._inductor.config.freezing  # what the runner sets stays with it


@pytest.mark.parametrize("backend", ["eager", "compile", "frozen"])  # torch.onnx.export itself keeps what it exported
def test_a_runner_that_goes_lets_go_of_the_weights(backend):
    module = small()
    weight = weakref.ref(module[0].weight)
    run = make_runner(module, (torch.randn(1, 3, 8, 8),), backend)
    run()
    del module, run
    gc.collect()
    assert weight() is None


def test_noise_is_the_same_each_time_and_draws_nothing():
    state, like = torch.get_rng_state(), torch.empty(0, dtype=torch.float16)
    with torch.device("meta"):  # as somebody's default
        one, two = fixed_normal((50, 40), like, 0.5), fixed_normal((50, 40), like, 0.5)
    assert one.dtype == torch.float16 and one.device.type == "cpu" and torch.equal(one, two)
    assert 0.45 < float(one.float().std()) < 0.55
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ["compile", "frozen", "onnxruntime"])
def test_a_module_that_a_backend_cannot_run(backend):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(OptionError, match=f"'{backend}' cannot run this Branches, choose another"):
        make_runner(Branches(), (torch.randn(3),), backend)


def test_a_failing_forward_is_not_dressed_up_in_eager():
    with pytest.raises(RuntimeError, match="channels"):
        make_runner(small(), (torch.randn(1, 2, 8, 8),), "eager")


def test_times_are_seconds_a_call():
    fast, slow = time_interleaved([lambda: time.sleep(0.001), lambda: time.sleep(0.004)], rounds=5, seconds=0.005)
    # The least of each: a busy machine makes any one sleep longer, and none shorter.
    assert 0.001 <= min(fast.seconds) < 0.003
    assert 0.004 <= min(slow.seconds) < 0.008
    assert len(fast.seconds) == len(slow.seconds) == 5
    found = quotients(slow, fast)
    each = sorted(one / other for one, other in zip(slow.seconds, fast.seconds, strict=True))
    assert each[0] <= found.lower <= found.median == each[2] <= found.upper <= each[-1]


def test_samples_last_as_long_as_asked():
    calls = 0

    def run():
        nonlocal calls
        calls += 1
        time.sleep(0.001)

    start = time.perf_counter()
    time_interleaved([run], rounds=2, seconds=0.05)
    assert calls > 2 and time.perf_counter() - start > 2 * 0.05 * 0.8  # the number of calls is estimated


def test_rounds_interleave_and_rotate():
    order = []
    runs = [lambda name=name: (order.append(name), time.sleep(0.002)) for name in "abc"]
    time_interleaved(runs, rounds=4, seconds=0.001)
    turns = [name for before, name in zip(["", *order], order, strict=False) if name != before]
    # after the calibration, abc; where a round begins with the name the last one ended with, the two run together
    assert "".join(turns) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_timers_leave_threads_alone():
    seen = []
    with thread_count(2):
        time_interleaved([lambda: seen.append(torch.get_num_threads())], rounds=1, seconds=1e-9)
        assert torch.get_num_threads() == 2
    assert set(seen) == {2}


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(median=3.0, lower=2.0, upper=4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    timing = Timing((3.0, 1.0, 2.0, 5.0, 4.0))
    assert timing.median == statistics.median(timing.seconds)
    assert timing.interquartile_range == 2.0
    assert quotients(Timing((2.0, 9.0, 4.0)), Timing((1.0, 3.0, 4.0))).median == 2.0  # round by round, not 4/3
    with pytest.raises(ValueError):
        quotients(Timing((1.0,)), Timing((1.0, 2.0)))


@pytest.mark.parametrize("options", [{"rounds": 0}, {"rounds": 1.5}, {"rounds": True}, {"seconds": 0}])
def test_bad_numbers(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        time_interleaved([lambda: None], **{"rounds": 1, "seconds": 0.01} | options)
    with pytest.raises(OptionError, match="seconds"):
        time_interleaved([lambda: None], rounds=1, seconds=float("inf"))


@pytest.mark.parametrize("count", [0, -1, 1.0, True])
def test_bad_threads(count):
    with pytest.raises(OptionError, match="threads"), thread_count(count):
        pass


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
