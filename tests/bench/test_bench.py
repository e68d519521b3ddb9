"""The benchmark: what it counts, compares and writes; and that it says why where it measured nothing."""

import json
import math
import os
import subprocess
import sys
from importlib import metadata

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import nmconv
from nmconv import __main__ as command_line
from nmconv.bench import Cell, Settings, run
from nmconv.bench import benchmark as running
from nmconv.bench import measure as measuring
from nmconv.bench.command import app
from nmconv.bench.measure import difference
from nmconv.bench.models import build, randomize_norms
from nmconv.errors import FileError, MergeError, OptionError
from nmconv.timing import quotients

QUICK = {"size": 12, "rounds": 2, "seconds": 1e-4, "batches": (1,), "backends": ("eager",)}
FLAGS = ["--size", "32", "--rounds", "2", "--seconds", "1e-4", "--batch", "1", "--backend", "eager"]
SMALL = "mobilenetv2_035"


def unit(channels, *rest):
    return [*rest, nn.BatchNorm2d(channels), nn.ReLU()]


def small():
    """A pair that pays (1x1 expand, 1x1 project), a conv, and a classifier; norms that are none."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), *unit(4)]
    layers += [nn.Conv2d(4, 24, 1, bias=False), *unit(24), nn.Conv2d(24, 4, 1, bias=False), *unit(4)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    randomize_norms(model, torch.randn(4, 3, 12, 12))
    return model


def only(result) -> Cell:
    (cell,) = result.cells
    return cell


def called(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


# -- what is counted and compared -------------------------------------------------------------------------------------


def test_counts_are_those_of_the_modules():
    result = run(small(), Settings(ratio="3:1", gate="multiply_adds", **QUICK))
    pixels, stem, pair, linear = 144, 3 * 9 * 4, 2 * 4 * 24, 20
    assert (result.original.activations, result.original.convs) == (3, 3)
    assert result.original.multiply_adds == pixels * (stem + pair) + linear
    assert (result.converted.activations, result.converted.convs) == (1, 3)
    assert result.converted.multiply_adds == result.original.multiply_adds
    merged = only(result).measured.network
    assert (merged.activations, merged.convs) == (1, 1)
    assert merged.multiply_adds == pixels * stem + linear


def test_ratios_are_of_the_times_shown():
    found = only(run(small(), Settings(ratio="3:1", **QUICK | {"rounds": 5}))).measured
    for other, ratio in (
        (found.converted, found.original_over_converted),
        (found.merged, found.original_over_merged),
    ):
        assert len(other.seconds) == 5
        assert ratio == quotients(found.original, other)


def test_the_three_networks_have_their_norms_folded_and_compute_what_they_should(monkeypatch):
    seen = []
    measured = running.measure_latencies
    monkeypatch.setattr(
        running, "measure_latencies", lambda nets, *args, **rest: seen.append(nets) or measured(nets, *args, **rest)
    )
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = run(model, Settings(ratio="3:1", **QUICK))
    ((original, converted, merged),) = seen
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(original(x), model(x))
    torch.testing.assert_close(converted(x), nmconv.convert(model, "3:1", keep="boundary")(x))
    torch.testing.assert_close(merged(x), converted(x))
    assert not torch.allclose(original(x), converted(x))
    for network in seen[0]:
        assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert 0 < only(result).measured.difference < 1e-5
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_difference_shows_a_wrong_merge(monkeypatch):
    def wrong(model, **options):
        merged = nmconv.merge(model, **options)
        with torch.no_grad():
            merged.get_submodule("11").bias += 1
        return merged

    monkeypatch.setattr(running, "merge", wrong)
    assert only(run(small(), Settings(ratio="3:1", **QUICK))).measured.difference > 0.1


def test_difference():
    assert difference([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -5.0])]) == pytest.approx(0.2)
    assert difference(torch.zeros(2), torch.zeros(2)) == 0
    for bad in (math.nan, math.inf):
        with pytest.raises(ArithmeticError):
            difference(torch.tensor([bad]), torch.ones(1))
        with pytest.raises(ArithmeticError):
            difference(torch.ones(1), torch.tensor([bad]))
    with pytest.raises(ArithmeticError):
        difference(torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError):
        difference([torch.ones(1)], [torch.ones(1), torch.ones(1)])


def test_without_conversion():
    result = run(small(), Settings(ratio="none", **QUICK | {"batches": (1, 2)}))
    assert result.converted == result.original
    assert [cell.measured.network for cell in result.cells] == [result.original] * 2
    assert len([note for note in result.notes if "nothing was merged" in note]) == 1
    assert not [note for note in run(small(), Settings(ratio="3:1", **QUICK)).notes if "nothing" in note]


def test_channels_last_is_for_all_three_and_the_images_and_leaves_the_model_alone(monkeypatch):
    seen = []

    def runner(module, inputs, backend):
        values = [value for value in (*inputs, *module.parameters()) if value.dim() == 4 and value.shape[1] > 1]
        values = [value for value in values if value.shape[2:] != (1, 1)]
        seen.append({value.is_contiguous(memory_format=torch.channels_last) for value in values})
        return torch.no_grad()(lambda: module(*inputs))

    monkeypatch.setattr(measuring, "make_runner", runner)
    model = small()
    model.last = model(torch.randn(1, 3, 12, 12))  # is no leaf: copy.deepcopy would refuse it
    result = run(model, Settings(ratio="3:1", channels_last=True, **QUICK))
    assert seen == [{True}] * 3 and result.settings.channels_last
    assert result.cells[0].measured, result.cells[0].why
    assert result.cells[0].measured.network != result.converted
    run(model, Settings(ratio="3:1", **QUICK))
    assert seen[3:] == [{False}] * 3


def test_a_gate_by_latency_merges_anew_for_each_cell(monkeypatch):
    calls = []

    def spy(model, *, backend, example_inputs, **options):
        calls.append((backend, example_inputs[0].shape[0], options["gate"]))
        return nmconv.merge(model, gate="multiply_adds", example_inputs=example_inputs)

    monkeypatch.setattr(running, "merge", spy)
    monkeypatch.setattr(measuring, "make_runner", lambda module, inputs, backend: lambda: module(*inputs))
    options = QUICK | {"batches": (1, 3), "backends": ("eager", "compile")}
    result = run(small(), Settings(ratio="3:1", gate="latency", **options))
    assert [(cell.backend, cell.batch) for cell in result.cells] == [call[:2] for call in calls]
    assert calls == [(backend, batch, "latency") for backend in ("eager", "compile") for batch in (1, 3)]
    calls.clear()
    run(small(), Settings(ratio="3:1", gate="multiply_adds", **options))
    assert len(calls) == 1


def test_latency_gate_for_real():
    cell = only(run(small(), Settings(ratio="3:1", gate="latency", **QUICK | {"size": 64})))
    assert cell.measured is not None, cell.why


def test_threads_are_set_and_restored(monkeypatch):
    seen = []
    measured = running.measure_latencies
    monkeypatch.setattr(
        running,
        "measure_latencies",
        lambda *args, **rest: seen.append(torch.get_num_threads()) or measured(*args, **rest),
    )
    run(small(), Settings(ratio="3:1", threads=2, **QUICK))
    assert seen == [2]
    assert torch.get_num_threads() == 1


# -- what cannot be measured ------------------------------------------------------------------------------------------


def test_a_cell_that_fails_says_why_and_holds_no_number(monkeypatch):
    real = measuring.make_runner

    def runner(module, inputs, backend):
        if backend == "compile":
            raise RuntimeError("no compiler\nat all")
        return real(module, inputs, backend)

    monkeypatch.setattr(measuring, "make_runner", runner)
    result = run(small(), Settings(ratio="3:1", **QUICK | {"backends": ("compile", "eager")}))
    failed, good = result.cells
    assert failed == Cell("compile", 1, None, "not measured: no compiler at all")
    assert good.measured is not None and good.why == ""
    assert json.loads(result.to_json())["cells"][0] == {
        "backend": "compile",
        "batch": 1,
        "measured": None,
        "why": "not measured: no compiler at all",
    }


def test_missing_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OptionError, match=r"pip install 'nmconv\[onnx\]'"):
        run(small(), Settings(**QUICK | {"backends": ("eager", "onnxruntime")}))
    monkeypatch.setattr(running, "BACKENDS", ("eager", "onnxruntime"))  # compiling takes long
    result = run(small(), Settings(ratio="3:1", **QUICK | {"backends": ()}))
    assert result.cells[0].measured is not None
    assert result.cells[1].measured is None
    assert result.cells[1].why.startswith("not measured: ") and "nmconv[onnx]" in result.cells[1].why


def test_outputs_that_are_not_finite_are_not_measured():
    model, network = nn.Sequential(nn.Conv2d(3, 4, 1)), only(run(small(), Settings(**QUICK))).measured.network
    images = torch.full((1, 3, 4, 4), float("inf"))
    with pytest.raises(ArithmeticError, match="finite"):
        measuring.measure_latencies((model, model, model), network, images, "eager", rounds=1, seconds=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"batches": (0,)},
        {"batches": ()},
        {"batches": (1.5,)},
        {"size": 0},
        {"size": "224"},
        {"rounds": 0},
        {"seconds": -1.0},
        {"threads": 0},
        {"device": "quantum"},
        {"device": "meta"},
        {"gate": "vibes"},
        {"min_gain": math.nan},
        {"weights": "some.pt"},
        {"backends": ("tensorrt",)},
    ],
)
def test_bad_options(options):
    with pytest.raises(OptionError, match=next(iter(options)).rstrip("s")):
        run(small(), Settings(**QUICK | options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(OptionError, match="device='cuda'"):
        run(small(), Settings(**QUICK | {"device": "cuda"}))


def test_a_size_that_the_network_does_not_run_on():
    model = nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU(), nn.Conv2d(4, 4, 9), nn.ReLU()).eval()
    with pytest.raises(OptionError, match=r"size=12: .*\(3, 12, 12\)"):
        run(model, Settings(**QUICK))


def test_train_mode_is_refused():
    with pytest.raises(MergeError, match="eval"):
        run(small().train(), Settings(**QUICK))


# -- models -----------------------------------------------------------------------------------------------------------


def test_built_networks_are_the_same_each_time_and_leave_the_random_state():
    state = torch.random.get_rng_state()
    one, two = build(SMALL), build(SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not one.training
    for first, second in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_settled_norms_are_not_trivial_and_keep_everything_in_range():
    model = build("torchvision:googlenet")
    momentum = model.conv1.bn.momentum
    randomize_norms(model, torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    used = [norm for norm in norms if norm.num_batches_tracked]
    assert len(used) > 50
    for norm in used:
        assert norm.running_mean.std() > 0 and norm.running_var.std() > 0
        assert norm.weight.std() > 0.1 and norm.bias.std() > 0.01
    assert not any(module.training for module in model.modules())
    assert model.conv1.bn.momentum == momentum
    assert 1e-3 < model(torch.randn(2, 3, 64, 64)).std() < 1e3


@pytest.mark.parametrize("suffix", [pytest.param(".pt", marks=pytest.mark.slow), ".safetensors"])
def test_weights_are_loaded_and_their_norms_left_alone(tmp_path, suffix):
    from safetensors.torch import save_file

    source = timm.create_model(SMALL)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(0.25)
    path = tmp_path / f"weights{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    for key, value in build(SMALL, str(path)).state_dict().items():
        assert torch.equal(value, source.state_dict()[key])
    settled = running._build_and_check(
        SMALL, run(SMALL, Settings(weights=str(path), **QUICK | {"size": 32})).settings, torch.device("cpu")
    )
    assert settled.bn1.running_mean.eq(0.25).all()


@pytest.mark.parametrize("damage", ["missing", "garbage", "foreign", "evil"])
def test_bad_weights(tmp_path, damage):
    path = tmp_path / "weights.pt"
    if damage == "garbage":
        path.write_bytes(b"\x00garbage" * 40)
    elif damage == "foreign":
        torch.save({"weight": torch.ones(2)}, path)
    elif damage == "evil":
        torch.save({"weight": print}, path)
    with pytest.raises(FileError, match=r"weights\.pt: no weights for mobilenetv2_035"):
        build(SMALL, str(path))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet1888", "did you mean resnet18"),
        ("torchvision:resnet19", "did you mean resnet1"),
        ("torchvision:maskrcnn_resnet50_fpn", "classifiers"),
        ("nothing of the kind", "torchvision:NAME"),
    ],
)
def test_unknown_models(name, hint):
    with pytest.raises(OptionError, match=hint):
        build(name)


def test_missing_zoo(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OptionError, match=r"timm is not installed: pip install 'nmconv\[bench\]'"):
        build(SMALL)


# -- what is written --------------------------------------------------------------------------------------------------


def test_json_holds_everything():
    result = run(small(), Settings(ratio="3:1", **QUICK))
    found = json.loads(result.to_json())
    times = found["cells"][0]["measured"]["merged"]
    assert times["seconds"] == list(only(result).measured.merged.seconds)
    assert times["lower"] <= times["median"] <= times["upper"]
    assert found["original"] == {"activations": 3, "convs": 3, "multiply_adds": result.original.multiply_adds}
    assert found["settings"]["ratio"] == "3:1" and found["settings"]["threads"] == 1
    assert found["environment"]["versions"]["torch"] == metadata.version("torch")
    assert found["environment"]["device"]
    assert found["version"] == 1


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    result = run(small(), Settings(ratio="3:1", **QUICK))
    path = tmp_path / "bench.json"
    result.save(path)
    first = path.read_text()
    assert json.loads(first)["model"] == "Sequential"

    def fail(*names):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        result.save(path)
    assert path.read_text() == first
    assert os.listdir(tmp_path) == ["bench.json"]


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    path = tmp_path / "bench.json"
    done = called(SMALL, "--ratio", "3:1", "--relocate", "--hoist-padding", "--json", str(path), *FLAGS, "--batch", "2")
    assert done.exit_code == 0, done.output
    for word in ("original", "converted", "merged", "folded", "eager", "activations", "convs", "multiply-adds"):
        assert word in done.output
    found = json.loads(path.read_text())
    assert [(cell["backend"], cell["batch"]) for cell in found["cells"]] == [("eager", 1), ("eager", 2)]
    assert found["settings"]["relocate"] is found["settings"]["hoist_padding"] is True
    first = found["cells"][0]["measured"]
    assert first["network"]["convs"] < found["original"]["convs"] == 52
    assert first["difference"] < 1e-4
    for network in ("original", "converted", "merged"):
        assert f"{first[network]['median'] * 1e3:.2f}" in done.output
    assert f"{first['original_over_merged']['median']:.3f}" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet1888"], "did you mean resnet18"),
        ([SMALL, "--backend", "tensorrt"], "eager, compile, frozen, onnxruntime"),
        ([SMALL, "--ratio", "1:2"], "1:2"),
        ([SMALL, "--json", "no/such/folder/bench.json"], "its folder does not exist"),
        ([SMALL, "--weights", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_errors_of_the_command(arguments, message):
    done = called(*arguments, *([] if "--backend" in arguments else FLAGS))
    assert done.exit_code == 2
    assert "Traceback" not in done.output and message in done.output.replace("\n", "")


def test_a_table_without_a_number_is_a_failure(monkeypatch):
    def fail(*args, **rest):
        raise MemoryError

    monkeypatch.setattr(running, "measure_latencies", fail)
    done = called(SMALL, "--ratio", "none", *FLAGS)
    assert done.exit_code == 1
    assert "eager, batch 1: not measured: MemoryError" in done.output


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_command_line_packages(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"needs {package}: pip install 'nmconv\[bench\]'"):
        command_line.main()


def test_the_library_needs_none_of_the_optional_packages():
    optional = ("typer", "rich", "timm", "torchvision", "onnx", "onnxruntime", "onnxscript")
    code = f"""
import sys
for name in {optional!r}:
    sys.modules[name] = None
import torch, nmconv.bench
settings = nmconv.bench.Settings(ratio="none", size=4, backends=("eager",), batches=(1,), rounds=1, seconds=1e-4)
found = nmconv.bench.run(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU()).eval(), settings)
assert found.cells[0].measured, found.cells[0].why
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
