"""python -m nmconv.run: scripts that call timm and torchvision in the ways that people do, unaware of nmconv."""

import builtins
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import optimizer

import nmconv
from nmconv import flow
from nmconv.run import command, zoo_builders
from nmconv.run.models import Models

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(folder, *command, launcher=("-m", "nmconv.run")):
    """What ``python -m nmconv.run command`` does in a folder."""
    return subprocess.run([sys.executable, *launcher, *command], cwd=folder, env=ENV, capture_output=True, text=True)


def told(done):
    """What nmconv.run has printed."""
    return [line.removeprefix("nmconv.run: ") for line in done.stderr.splitlines() if line.startswith("nmconv.run: ")]


# Whole runs: scripts check by themselves what became of their models

NUMBERS = """
import torch

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return i, __name__

def check_workers():
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert [(numbers.tolist(), *names) for numbers, names in loader] == [
        ([0, 1], "__mp_main__", "__mp_main__"), ([2, 3], "__mp_main__", "__mp_main__")]
"""
TRAIN = f"""{NUMBERS}
def main():
    import sys
    assert "timm" not in sys.modules and "torchvision" not in sys.modules  # HF_HOME and the like may be set here
    import argparse, os
    from helper import parse  # beside the script, not where the run was started
    from timm.models import create_model, load_checkpoint, safe_model_name
    from timm.task.distillation import DistillationTeacher

    args = parse(argparse.ArgumentParser())
    assert sys.argv == ["scripts/train.py", "--model", "test_resnet", "--", "-x"] and args.rest == ["-x"], sys.argv
    assert __name__ == "__main__" and os.path.isabs(__file__) and os.path.samefile(__file__, "scripts/train.py")
    assert sys.path[0] == os.path.dirname(__file__) and sys.modules["__main__"].main is main and __spec__ is None

    torch.manual_seed(1)
    model = create_model(args.model, pretrained=False, in_chans=3, num_classes=5, drop_rate=0.0, drop_path_rate=None,
                         drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=True,
                         checkpoint_path="weights.pth")
    drawn = torch.rand(3)
    teacher = DistillationTeacher("test_resnet", num_classes=5, in_chans=3, pretrained_path="weights.pth")
    torch.manual_seed(1)
    again = create_model(args.model, num_classes=5)
    assert torch.equal(drawn, torch.rand(3)), "numbers that the script draws later are others"

    check_workers()
    import nmconv
    assert nmconv.get_plan(model) is not None, "not converted"
    assert all(nmconv.get_plan(each) is None for each in (again, teacher.model)), "only the first was asked for"
    weights = torch.load("weights.pth")
    assert list(weights) == list(model.state_dict()) and all(torch.equal(weights[key], value) for key, value in
                                                             model.state_dict().items()), "not what the checkpoint has"
    x = torch.rand(2, 3, 32, 32)
    assert not torch.equal(model.eval()(x), teacher.model.eval()(x))
    assert torch.equal(torch.jit.script(model)(x), model(x))
    try:
        nmconv.convert(model)
    except nmconv.AlreadyConvertedError:
        sys.exit(7)

if __name__ == "__main__":
    main()
"""


def test_a_script_like_timms_and_its_exit_code(tmp_path):
    import timm

    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(TRAIN)
    (tmp_path / "scripts" / "helper.py").write_text(
        "def parse(parser):\n    parser.add_argument('--model')\n    parser.add_argument('rest', nargs='*')\n"
        "    return parser.parse_args()\n"
    )
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "weights.pth")
    done = run(tmp_path, "--ratio", "2:1", "--", "scripts/train.py", "--model", "test_resnet", "--", "-x")
    assert done.returncode == 7, done.stderr
    first, *later = told(done)
    assert first.startswith("test_resnet is converted: ResNet at 2:1: ") and " activations -> " in first
    assert later == ["test_resnet stays as it is: the first model is converted, this one came later"] * 2
    assert done.stdout == ""


TIMM = """
import timm, timm.models, torch
from timm import create_model as one
from timm.models import create_model as two, test_resnet
from timm.models._factory import create_model as three
from timm.models._registry import model_entrypoint
from timm.models.resnet import ResNet, BasicBlock

@timm.models.register_model
def mine(pretrained=False, **kwargs):
    inner = timm.create_model("test_resnet")
    assert nmconv.get_plan(inner) is None, "a part of a model was converted by itself"
    return torch.nn.Sequential(inner)

import nmconv
models = [make("test_resnet") for make in (one, two, three, timm.create_model, timm.models.create_model)]
models += [test_resnet(), timm.models.test_resnet(), timm.models.__dict__["test_resnet"]()]
models += [timm.models.byobnet.test_byobnet(), model_entrypoint("test_resnet")(), one(model_name="test_resnet")]
models += [one("test_resnet.r160_in1k"), one("mine")]
models += [one("test_resnet", features_only=True, feature_cls=how) for how in (None, "hook", "fx")]
assert [nmconv.get_plan(each) is None for each in models] == [False] * len(models)
assert [len(each(torch.rand(2, 3, 32, 32))) for each in models[-3:]] == [5, 5, 5]
for left in (one("test_efficientnet"), ResNet(BasicBlock, (1, 1, 1, 1))):
    assert nmconv.get_plan(left) is None
assert timm.is_model("test_resnet") and "test_resnet" in timm.list_models(module="resnet")
"""


def test_each_way_to_timms_models_and_only_those_that_match(tmp_path):
    (tmp_path / "ways.py").write_text(TIMM)
    done = run(tmp_path, "--match", "test_resnet", "--match", "M?NE", "--match", "*byob*", "--", "ways.py")
    assert done.returncode == 0, done.stderr
    lines = told(done)
    assert [line for line in lines if "is converted" not in line] == [
        "test_efficientnet stays as it is: --match does not name it"
    ]
    assert [line.split()[0] for line in lines[8:13]] == [
        *("test_byobnet", "test_resnet", "test_resnet", "test_resnet.r160_in1k", "mine")
    ]


TORCHVISION = """
import sys
import torchvision.models as models, torch
from torchvision.models import get_model, squeezenet1_1
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
assert "timm" not in sys.modules
import nmconv
made = [squeezenet1_1(), models.squeezenet1_1(), models.squeezenet.squeezenet1_1(), models.__dict__["squeezenet1_1"]()]
made += [models.get_model_builder("squeezenet1_1")(num_classes=3), get_model("SqueezeNet1_1")]
made += [models.get_model(name="squeezenet1_1", weights=None), detector]
made += [models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None)]
assert [nmconv.get_plan(each) is None for each in made] == [False] * len(made)
inner = [name for name, part in detector.named_modules() if name and nmconv.get_plan(part) is not None]
assert not inner, inner
assert models.get_model_weights(models.squeezenet1_1) is models.SqueezeNet1_1_Weights
assert "squeezenet1_1" in models.list_models(module=models)
raise KeyError("the script's own")
"""


def test_torchvisions_builders_and_an_exception(tmp_path):
    (tmp_path / "ways.py").write_text(TORCHVISION)
    done = run(tmp_path, "--match", "*", "--no-witness", "ways.py")
    assert done.returncode == 1 and done.stderr.endswith('KeyError: "the script\'s own"\n'), done.stderr
    assert [line.split(" is converted: ")[0] for line in told(done)] == [
        "ssdlite320_mobilenet_v3_large",
        *["squeezenet1_1"] * 5,
        "SqueezeNet1_1",
        "squeezenet1_1",
        "lraspp_mobilenet_v3_large",
    ]


def test_a_module_with_spawned_workers_and_a_saved_plan(tmp_path):
    import timm

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(f"""{NUMBERS}
if __name__ == "__main__":
    from timm import create_model
    model = create_model("test_resnet", num_classes=2)
    check_workers()
    import sys
    assert sys.argv == [__file__, "-m"] and __spec__.name == "package.train", sys.argv
""")
    plan = nmconv.make_plan(timm.create_model("test_resnet"), "3:1", keep="first")
    (tmp_path / "plan.json").write_text(plan.to_json())
    done = run(tmp_path, "--plan", "plan.json", "--", "-m", "package.train", "-m")
    assert done.returncode == 0, done.stderr
    assert told(done) == [f"test_resnet is converted: {str(plan).splitlines()[0]}"]


RANKS = """
import torch, torch.distributed as dist
from timm import create_model
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = create_model("test_resnet", num_classes=2)
import nmconv
text = nmconv.get_plan(model).to_json()
texts = [None, None]
dist.all_gather_object(texts, text)
assert texts == [text, text]
together = torch.nn.parallel.DistributedDataParallel(model)
together(torch.rand(2, 3, 32, 32)).square().sum().backward()
first = next(model.parameters()).grad
sums = first.clone()
dist.all_reduce(sums)
assert torch.allclose(sums, 2 * first) and first.abs().sum() > 0
del together  # or its threads may outlive the process group
dist.destroy_process_group()
"""


def test_two_ranks_have_one_plan_and_one_voice(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nmconv.run")
    done = run(tmp_path, "--", "ranks.py", launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in told(done)] == ["test_resnet is converted"]


# In this process: the zoos are not patched


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Lets a run leave this process as it was, and writes its script; builders say so by calling ``built``."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(optimizer, "_global_optimizer_pre_hooks", type(optimizer._global_optimizer_pre_hooks)())
    monkeypatch.setattr(command, "watch_builders", lambda built: monkeypatch.setattr(builtins, "built", built, False))
    monkeypatch.chdir(tmp_path)

    def go(text, *options):
        Path("script.py").write_text(text)
        command.main([*options, "--", "script.py"])

    return go


NET = "from torch import nn\nnet = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())\n"


@pytest.mark.parametrize("end", ["", "raise SystemExit", "import sys; sys.exit(0)"])
def test_a_script_that_ends_well_without_a_converted_model_fails(alone, end):
    with pytest.raises(SystemExit, match=r"no model was converted: none was created by timm's or torchvision's"):
        alone(end)
    with pytest.raises(SystemExit, match=r"no model was converted: --match names none of net, other$"):
        alone(NET + "for name in ('net', 'other', 'net'): assert built(name, net) is net\n" + end, "--match", "x*")


@pytest.mark.parametrize("before", ["", NET + "built('net', net)\n"])
@pytest.mark.parametrize("code", [3, "in its own words"])
def test_a_script_that_fails_does_so_in_its_own_way(alone, before, code):
    with pytest.raises(SystemExit) as end:
        alone(f"{before}raise SystemExit({code!r})")
    assert end.value.code == code
    with pytest.raises(ZeroDivisionError):
        alone(before + "1 / 0")


def test_a_script_that_ends_well_with_one_does_so(alone):
    alone(NET + "built('net', net)\nassert isinstance(net[3], nn.Identity)")
    with pytest.raises(SystemExit) as end:
        alone(NET + "built('net', net)\nraise SystemExit")
    assert end.value.code is None


def test_a_model_that_cannot_be_converted_stops_the_script(alone):
    with pytest.raises(nmconv.NoSitesError):
        alone("from torch import nn\nbuilt('net', nn.Sequential(nn.Conv2d(3, 3, 1)))\nraise SystemExit(3)")


def test_a_script_that_goes_on_without_it_fails_all_the_same(alone):
    text = "from torch import nn\ntry:\n    built('net', nn.Conv2d(3, 3, 1))\nexcept ValueError:\n    pass\n"
    with pytest.raises(SystemExit, match="no model was converted: net raised an error, which the script caught"):
        alone(text)


def test_a_model_of_which_nothing_is_dropped_is_none_that_was_converted(alone, capsys):
    one = "small = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())\nbuilt('small', small)\n"
    with pytest.warns(nmconv.NoEffectWarning), pytest.raises(SystemExit, match="nothing is dropped of small"):
        alone(NET + one)
    assert "small stays as it is: 2:1 drops nothing of it" in capsys.readouterr().err
    with pytest.warns(nmconv.NoEffectWarning):
        alone(NET + one + "built('net', net)\nassert type(net[3]) is nn.Identity")


def test_the_options_are_converts(alone):
    text = NET + "built('net', net)\nassert [type(each).__name__ for each in net] == {}.split()"
    alone(text.format("'Conv2d Identity Conv2d ReLU'"), "--keep", "boundary")
    alone(text.format("'Conv2d ReLU Conv2d Identity'"), "--include", "0", "--include", "2", "--no-witness")
    deep = "net[0].padding = net[2].padding = (1, 1)\n"
    alone(NET + deep + "built('net', net)\nassert net[0].padding == (2, 2)", "--keep", "boundary", "--hoist-padding")
    moved = NET + "net.insert(3, nn.MaxPool2d(2))\nnet.insert(3, nn.Conv2d(4, 4, 3))\n"
    alone(moved + "built('net', net)\nassert type(net[1]) is nn.Identity", "--keep", "boundary", "--relocate")
    flat = "from torch import nn\nnet = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())\n"
    alone(flat + "built('net', net)\nassert type(net[3]) is nn.Identity", "--linear", "--ratio", "2:1")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "name the script to run"),
        (["--ratio", "2:1", "--"], "name the script to run"),
        (["--", "-m"], "name the script to run"),
        (["--", "missing.py"], "missing.py: no such file"),
        (["--ratio", "1:2", "--", "script.py"], "1:2"),
        (["--keep", "middle", "--", "script.py"], "keep='middle' is unknown"),
        (["--plan", "missing.json", "--", "script.py"], "missing.json"),
        (["--plan", "script.py", "--", "script.py"], "plan"),
        (["--plan", "p.json", "--hoist-padding", "--", "script.py"], "--plan and --hoist-padding exclude each other"),
        (["--rat", "2:1", "--", "script.py"], "unrecognized|expected|--rat"),
    ],
)
def test_what_is_wrong_is_said_before_the_script_runs(alone, capsys, argv, words):
    Path("script.py").write_text("raise AssertionError('it ran')")
    with pytest.raises(SystemExit) as end:
        command.main(argv)
    assert end.value.code == 2 and re.search(words, capsys.readouterr().err)


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())


@pytest.mark.parametrize(
    ("pattern", "name", "is_meant"),
    [
        ("resnet50", "hf-hub:timm/ResNet50.a1_in1k", True),
        ("*.a1_in1k", "resnet50.a1_in1k", True),
        ("hf-hub:timm/*", "hf-hub:timm/resnet50.a1_in1k", True),
        ("resnet5", "resnet50.a1_in1k", False),
        ("resnet50.a2_in1k", "resnet50.a1_in1k", False),
        ("a1_in1k", "resnet50.a1_in1k", False),
    ],
)
def test_names_and_patterns(alone, pattern, name, is_meant):
    models = Models(lambda model: nmconv.get_plan(nmconv.convert(model, inplace=True)), (pattern,))
    assert (nmconv.get_plan(models.on_built(name, net())) is not None) == is_meant


def test_training_that_begins_before_a_model_is_converted_is_said_once(alone, capsys):
    models = Models(lambda model: nmconv.get_plan(nmconv.convert(model, inplace=True)), ())
    model = net()
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    steps.step()
    steps.step()
    assert capsys.readouterr().err.count("warning: training has begun, and no model was converted") == 1
    models.on_built("net", model)
    assert not optimizer._global_optimizer_pre_hooks


def test_other_ranks_are_silent_but_for_errors(alone, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    alone(NET + "built('net', net)")
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match="no model was converted"):
        alone("")


def test_a_package_is_patched_when_all_of_it_is_imported(tmp_path, monkeypatch):
    seen = []
    hook = zoo_builders._AfterImport("some_zoo", lambda: seen.append(sys.modules["some_zoo"].part.value))
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    with pytest.raises(ModuleNotFoundError):
        import some_zoo
    (tmp_path / "some_zoo").mkdir()
    (tmp_path / "some_zoo" / "__init__.py").write_text("from . import part\n")
    (tmp_path / "some_zoo" / "part.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)  # as a script may do before it imports its own copy
    import some_zoo
    from some_zoo.part import value

    assert seen == [value] == [1] and some_zoo.__file__ == str(tmp_path / "some_zoo" / "__init__.py")


def test_a_timm_that_keeps_its_builders_elsewhere_is_named(monkeypatch):
    import timm

    monkeypatch.delitem(sys.modules, "timm.models._registry")
    with pytest.raises(nmconv.OptionError, match=rf"timm {timm.__version__} has no 'timm.models._registry'"):
        flow.builders("timm")
