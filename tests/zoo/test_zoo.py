"""Models of timm and torchvision against the oracle: a few here, one of each file and every name under ``slow``."""

from __future__ import annotations

import warnings

import pytest
import timm

import nmconv
from zoo import models as zoo

# The counts that were worked out by hand from the words of the documentation: activations before and after 2:1.
BY_HAND = {
    "timm/resnet18": (17, 9),
    "torchvision/resnet18": (17, 9),
    "timm/resnet50": (49, 33),
    "torchvision/resnet50": (49, 33),
    "torchvision/alexnet": (5, 4),
    "torchvision/vgg16_bn": (13, 8),
    "timm/densenet121": (120, 62),
    "torchvision/densenet121": (120, 62),
    "torchvision/googlenet": (57, 38),
    "torchvision/inception_v3": (94, 68),
    "timm/mobilenetv2_100": (35, 18),
    "timm/seresnet50": (49, 33),
    "timm/rexnet_100": (33, 17),
}
ONE_OF_EACH_FILE = [name for name in zoo.one_of_each_file() if name not in zoo.FEW]


@pytest.mark.parametrize(("name", "counts"), BY_HAND.items())
def test_counts_worked_out_by_hand(name, counts):
    plan = nmconv.make_plan(zoo.build(name, "meta"))
    assert (plan.counts.activations_before, plan.counts.activations_after) == counts


@pytest.mark.parametrize("name", zoo.FEW)
def test_converted_equals_the_oracle(name):
    zoo.check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_FILE)
def test_one_of_each_file_equals_the_oracle(name):
    zoo.check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/efficientnet_b0", "timm/resnetv2_18", "timm/dla34"])
@pytest.mark.parametrize(
    "options",
    [{"keep": "boundary"}, {"keep": "spread", "ratio": "4:2"}, {"ratio": "4:1"}, {"ratio": "3:2"}, {"linear": True}],
)
def test_options_equal_the_oracle(name, options):
    zoo.check(name, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ratio"), [(name, zoo.RATIOS[1 + at % 3]) for at, name in enumerate(zoo.one_of_each_file())]
)
def test_other_ratios_convert_on_the_meta_device(name, ratio):
    """One other ratio each; the sweep has all of them for every name. The witness sees every model at 2:1."""
    model, given = zoo.to_plan(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        converted = nmconv.convert(model, ratio, witness=False, **given)
    plan = nmconv.get_plan(converted)
    assert plan is not None
    assert plan.ratio == ratio


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/efficientnet_b0", "torchvision/googlenet"])
def test_one_to_one_changes_nothing(name):
    with pytest.warns(nmconv.NoEffectWarning):
        converted = nmconv.convert(zoo.build(name), "1:1")
    assert not nmconv.get_plan(converted).changes
    assert [type(module) for module in converted.modules()] == [type(module) for module in zoo.build(name).modules()]


@pytest.mark.parametrize("name", ["timm/fasternet_t0", "timm/ghostnet_050", "torchvision/googlenet"])
def test_planning_in_train_mode_touches_no_tensor(name):
    """Shapes of these are looked at, in both modes: on fakes, never on the model's own buffers."""
    model = zoo.build(name).train()
    before = {key: (value, value._version) for key, value in model.state_dict(keep_vars=True).items()}
    nmconv.make_plan(model)
    after = {key: (value, value._version) for key, value in model.state_dict(keep_vars=True).items()}
    assert before.keys() == after.keys()
    assert all(before[key][0] is after[key][0] and before[key][1] == after[key][1] for key in before)


def test_every_timm_file_is_listed():
    """Each has a model that is checked, or none of its models has sites: a file that timm adds has to be listed."""
    checked = {zoo.file_of(name) for name in zoo.one_of_each_file() if name.startswith("timm/")}
    without = set(zoo.files_without_sites())
    assert not checked & without and set(zoo.FEW) <= set(zoo.one_of_each_file())
    assert checked | without == {zoo.file_of(name) for name in timm.list_models()}


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.all_names())
def test_every_name_of_both_zoos(name):
    if name.startswith("timm/") and zoo.file_of(name) in zoo.files_without_sites():
        with pytest.raises(nmconv.NoSitesError):
            nmconv.make_plan(zoo.to_plan(name)[0])
        return
    try:
        zoo.check(name)
    except nmconv.NoSitesError:
        assert name not in zoo.one_of_each_file()
