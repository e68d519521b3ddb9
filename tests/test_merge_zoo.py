"""Models of timm and torchvision: converted, norms given statistics, merged; the outputs are what they were.

A few of every kind here, one of every timm file under ``slow``. In float64 at 1e-8, on small pictures.
"""

import copy
import warnings

import pytest
import torch
import zoo
from merge_nets import Counts, assert_near, merge, statistics
from torch.utils._pytree import tree_map_only

import nmconv

torch.set_num_threads(1)

# name → whether something of it must merge where everything may
QUICK = {
    "timm/resnet18": True,
    "timm/resnetv2_18": True,
    "timm/mobilenetv2_100": True,
    "timm/mobilenetv3_small_050": True,
    "timm/densenet121": True,
    "timm/repvgg_a0": True,
    "timm/mobileone_s0": True,
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


def arguments(model):
    """What the model runs on in eval mode, in float64; and the same one pixel larger where that runs too."""
    found = []
    for args in zoo.inputs(model):
        args = tree_map_only(torch.Tensor, lambda value: value.double(), args)
        try:
            with torch.no_grad():
                found.append((args, model(*copy.deepcopy(args))))
        except Exception:
            continue
        break
    assert found, "no input fits"
    if not zoo.is_detector(model) and found[0][0][0].ndim == 4 and len(found[0][0]) == 1:
        larger = torch.nn.functional.pad(found[0][0][0], (0, 1, 0, 33), mode="reflect")
        try:
            with torch.no_grad():
                found.append(((larger,), model(larger.clone())))
        except Exception:
            pass
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
            model = nmconv.convert(model, ratio, inplace=True, **options)
    except nmconv.NoSitesError:
        pass
    wanted = arguments(model)
    keys, before = list(model.state_dict()), {key: value.clone() for key, value in model.state_dict().items()}
    after = None
    for gate in ("always", "flops"):
        merged = merge(model, gate=gate)
        assert type(merged) is type(model)
        for args, output in wanted:
            with torch.no_grad():
                assert_near(merged(*copy.deepcopy(args)), output, 1e-8)
        if after is None:
            after = convs(merged, wanted[0][0])
        for run in nmconv.find_runs(model) if gate == "flops" else ():
            assert run.exact or run.why
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return convs(model, wanted[0][0]), after


@pytest.mark.parametrize("name", QUICK)
def test_merged_equals_what_was_converted(name):
    before, after = check(name, hoist_padding=True)
    assert after < before or not QUICK[name]


@pytest.mark.slow
@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("name", zoo.quick_names())
def test_one_of_every_file(name, hoist):
    before, after = check(name, hoist_padding=hoist)
    assert after <= before


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.quick_names())
def test_other_ratios(name):
    before, after = check(name, "3:1", relocate=True, hoist_padding=True)
    assert after <= before


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.quick_names())
def test_live(name):
    """Factors kept: the same keys, and the same outputs."""
    torch.manual_seed(0)
    model = statistics(zoo.build(name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nmconv.NoEffectWarning)
            model = nmconv.convert(model, hoist_padding=True, inplace=True)
    except nmconv.NoSitesError:
        pass
    live = merge(model, live=True)
    assert list(live.state_dict()) == list(model.state_dict())
    for args, output in arguments(model):
        with torch.no_grad():
            assert_near(live(*copy.deepcopy(args)), output, 1e-8)
