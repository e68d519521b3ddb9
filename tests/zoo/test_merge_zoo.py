"""Models of timm and torchvision: converted, norms given statistics, merged; the outputs are what they were.

A few of every kind here, one of every timm file under ``slow``. In float64 at 1e-8, on small pictures.
"""

import contextlib
import copy
import warnings

import pytest
import torch
from merge_nets import Counts, assert_near, merge, statistics
from torch.utils._pytree import tree_map_only

import nmconv
from zoo import models as zoo

torch.set_num_threads(1)

# name → whether something of it must merge where everything may
QUICK = {
    "timm/resnet14t": True,
    "timm/mobilenetv2_100": True,
    "timm/mobilenetv3_small_050": True,
    "timm/densenet121": True,
    "timm/repvgg_a0": True,
    "timm/regnetx_002": True,
    "timm/ghostnet_050": True,
    "timm/dla46x_c": True,
    "timm/skresnet18": False,
    "timm/convnext_zepto_rms": False,
    "timm/efficientvit_b0": True,
    "timm/starnet_s050": True,
    "torchvision/squeezenet1_1": False,
    "torchvision/shufflenet_v2_x0_5": True,
    "torchvision/googlenet": True,
    "torchvision/mnasnet0_5": True,
}


LONG = {"timm/densenet121"}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in QUICK]


def outputs(model, args):
    """What the model returns; of a detector its feature maps and sorted scores, since ties order its boxes by noise."""
    with torch.no_grad():
        result = model(*copy.deepcopy(args))
        if zoo.is_detector(model):
            maps = model.backbone(args[0][0].unsqueeze(0))
            return maps, [found["scores"].sort().values for found in result]
    return result


def arguments(model):
    """What the model runs on in eval mode, in float64, with what it returns; and the same a few pixels larger."""
    found = []
    for args in zoo.inputs(model):
        args = tree_map_only(torch.Tensor, lambda value: value.double(), args)
        try:
            found.append((args, outputs(model, args)))
        except Exception:
            continue
        break
    if not found:
        pytest.skip("it does not run in float64")
    if not zoo.is_detector(model) and found[0][0][0].ndim == 4 and len(found[0][0]) == 1:
        larger = torch.nn.functional.pad(found[0][0][0], (0, 1, 0, 33), mode="reflect")
        with contextlib.suppress(Exception):
            found.append(((larger,), outputs(model, (larger,))))
    return found


def convs(model, args):
    """Convolutions that run on whatever batch."""
    tensor = args[0][0] if isinstance(args[0], list) else args[0]
    with torch.no_grad(), Counts(tensor.shape[0]) as found:
        model(*copy.deepcopy(args))
    return found.convs


def check(name, ratio="2:1", **options):
    """Returns how many convolutions ran before and after everything was merged."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = statistics(zoo.build(name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nmconv.NoEffectWarning)
            model = nmconv.convert(model, ratio, keep="boundary", inplace=True, **options)
    except nmconv.NoSitesError:
        pass
    wanted = arguments(model)
    keys, before = list(model.state_dict()), {key: value.clone() for key, value in model.state_dict().items()}
    after = None
    for gate in ("always", "multiply_adds"):
        merged = merge(model, gate=gate)
        assert type(merged) is type(model)
        for args, output in wanted:
            assert_near(outputs(merged, args), output, 1e-8)
        if after is None:
            after = convs(merged, wanted[0][0])
        for run in nmconv.find_runs(model) if gate == "multiply_adds" else ():
            assert run.exact or run.why
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return convs(model, wanted[0][0]), after


@pytest.mark.parametrize("name", NAMES)
def test_merged_equals_what_was_converted(name):
    before, after = check(name, hoist_padding=True)
    assert after < before or not QUICK[name]


@pytest.mark.slow
@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("name", zoo.one_of_each_file())
def test_one_of_every_file(name, hoist):
    before, after = check(name, hoist_padding=hoist)
    assert after <= before


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.one_of_each_file())
def test_other_ratios(name):
    before, after = check(name, "3:1", relocate=True, hoist_padding=True)
    assert after <= before


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.one_of_each_file())
def test_live(name):
    """Factors kept: the same keys, and the same outputs."""
    torch.manual_seed(0)
    model = statistics(zoo.build(name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nmconv.NoEffectWarning)
            model = nmconv.convert(model, hoist_padding=True, inplace=True, keep="boundary")
    except nmconv.NoSitesError:
        pass
    live = merge(model, live=True)
    assert list(live.state_dict()) == list(model.state_dict())
    for args, output in arguments(model):
        assert_near(outputs(live, args), output, 1e-8)
