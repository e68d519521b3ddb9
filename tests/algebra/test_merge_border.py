"""The map that a merged convolution adds at its border, kept from one call to the next: never older than the border."""

import copy

import pytest
import torch
from merge_nets import assert_near, merge, picture, settle
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import nmconv


def bordered():
    return settle(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1)))


def called_once(net):
    """Merged, and its map kept."""
    merged = merge(net)
    with torch.no_grad():
        assert_near(merged(picture(3, 7, 9)), net(picture(3, 7, 9)))
    assert merged[0].border is not None and merged[0]._cached_response is not None
    return merged


def through_vector(merged):
    values = torch.nn.utils.parameters_to_vector(merged.parameters())
    torch.nn.utils.vector_to_parameters(3 * values, merged.parameters())


def through_data(merged):
    for value in merged.parameters():
        value.data.mul_(3)


def by_new_data(merged):
    for value in merged.parameters():
        value.data = 3 * value.data


def in_place(merged):
    with torch.no_grad():
        for value in merged.parameters():
            value.mul_(3)


def by_new_parameters(merged):
    for name, value in list(merged[0]._parameters.items()):
        setattr(merged[0], name, None if value is None else nn.Parameter(3 * value.detach()))


def by_state(merged):
    merged.load_state_dict({name: 3 * value for name, value in merged.state_dict().items()})


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "write",
    [through_vector, through_data, by_new_data, in_place, by_new_parameters, by_state],
    ids=lambda f: f.__name__,
)
def test_whatever_writes_the_border_is_seen(write, frozen):
    net, x = bordered(), picture(3, 7, 9)
    merged = called_once(net.requires_grad_(not frozen))
    with torch.no_grad():
        write(merged)
        assert_near(merged(x), 3 * net(x))
        assert_near(merged(x), 3 * net(x))  # and is kept from then on


def test_other_parameters_for_one_call():
    net, x = bordered(), picture(3, 7, 9)
    merged = called_once(net)
    thrice = {name: 3 * value for name, value in merged.named_parameters()}
    with torch.no_grad():
        assert_near(torch.func.functional_call(merged, thrice, (x,)), 3 * net(x))
        assert_near(merged(x), net(x))


def test_an_ensemble_leaves_nothing_behind():
    net, x = bordered(), picture(3, 7, 9)
    merged = called_once(net)
    models = [merged, copy.deepcopy(merged)]
    in_place(models[1])
    parameters, buffers = torch.func.stack_module_state(models)
    with torch.no_grad():
        both = torch.vmap(lambda *state: torch.func.functional_call(merged, state, (x,)))(parameters, buffers)
        for found, times in zip(both, (1, 3), strict=True):
            assert_near(found, times * net(x))
        assert_near(merged(x), net(x))


def traced(merged, x):
    make_fx(merged, tracing_mode="fake", _allow_non_fake_inputs=True)(x)


def faked(merged, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        merged(mode.from_tensor(x))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("look", [traced, faked])
def test_tracing_leaves_nothing_behind(look, before):
    net, x = bordered(), picture(3, 7, 9)
    merged = called_once(net) if before else merge(net)
    with torch.no_grad():
        look(merged, x)
        assert type(merged(x)) is torch.Tensor
        assert_near(merged(x), net(x))


@pytest.mark.parametrize("make", [merge, nmconv.fold_norms, lambda net: nmconv.merge(merge(net, live=True))])
def test_nothing_is_shared_with_the_original(make):
    """In float64 nothing is to be cast, and a cast that is none makes no copy."""
    net = settle(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
    )
    own = {value.untyped_storage().data_ptr() for value in net.state_dict().values()}
    made = make(net)
    assert own.isdisjoint(value.untyped_storage().data_ptr() for value in made.state_dict().values())
