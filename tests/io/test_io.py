"""Saving and loading: what comes back is what was saved, to the bit; bad files change nothing; writing is atomic."""

from __future__ import annotations

import json
import math
import os
import random
import stat
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutants
import pytest
import safetensors
import timm
import torch
import torch.nn.functional as F
import torchvision
from calls import calls_of
from io_nets import (
    Net,
    Rep,
    classes,
    drawn,
    edited,
    file_of,
    held,
    parts_of,
    said,
    saying,
    snapshot,
    state,
    tensors_of,
)
from torch import Tensor, nn
from zoo import models as zoo

import nmconv


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.safetensors"


def reloaded(model: nn.Module, pristine: nn.Module, path: Path, **options: Any) -> nn.Module:
    """Saved and loaded: equal in all but what must not be, and the pristine model as it was."""
    before, modes = snapshot(pristine), {name: module.training for name, module in pristine.named_modules()}
    kept = snapshot(model)
    nmconv.save(model, path)
    assert snapshot(model) == kept
    loaded = nmconv.load(pristine, path, **options)
    if options.get("inplace"):
        assert loaded is pristine
    else:
        assert snapshot(pristine) == before
    assert {name: module.training for name, module in loaded.named_modules() if name in modes} == {
        name: mode for name, mode in modes.items() if name in dict(loaded.named_modules())
    }
    assert loaded.training == modes[""]
    assert all(module.training == loaded.training for module in loaded.modules())
    assert classes(loaded) == classes(model)
    assert nmconv.get_plan(loaded) == nmconv.get_plan(model)
    assert nmconv.get_merges(loaded) == nmconv.get_merges(model)
    return loaded


def assert_same(one: nn.Module, other: nn.Module, *inputs: Tensor) -> None:
    """The same state and outputs, to the bit, in eval mode."""
    assert state(one) == state(other)
    one.eval(), other.eval()
    for x in inputs:
        with torch.no_grad():
            assert torch.equal(one(x), other(x))


def pictures(model: nn.Module, sizes: tuple[int, ...] = (33, 16)) -> list[Tensor]:
    like = next(model.parameters())
    return [torch.rand(2, 3, size, size + 1, dtype=like.dtype) for size in sizes]


# Round trips ---------------------------------------------------------------------------------------------------------


def neither(net: nn.Module) -> nn.Module:
    return net


def converted(net: nn.Module) -> nn.Module:
    return nmconv.convert(net, "2:1", keep="boundary")


def relocated(net: nn.Module) -> nn.Module:
    return nmconv.convert(net, "4:1", relocate=True, hoist_padding=True, keep="boundary")


def merged_only(net: nn.Module) -> nn.Module:
    return nmconv.merge(net, gate="always")


def both(net: nn.Module) -> nn.Module:
    return nmconv.merge(nmconv.convert(net, "3:1", keep="boundary"), gate="always")


def by_flops(net: nn.Module) -> nn.Module:
    return nmconv.merge(nmconv.convert(net, "2:1", hoist_padding=True, keep="boundary"))


def folded(net: nn.Module) -> nn.Module:
    return nmconv.fold_norms(nmconv.convert(net, "2:1", keep="boundary"))


def twice(net: nn.Module) -> nn.Module:
    return nmconv.merge(nmconv.fold_norms(nmconv.convert(net, "2:1", keep="boundary")), gate="always")


def live(net: nn.Module) -> nn.Module:
    return nmconv.merge(nmconv.convert(net, "2:1", keep="boundary"), gate="always", live=True)


def baked(net: nn.Module) -> nn.Module:
    return nmconv.merge(live(net), gate="always")


MADE = (neither, converted, relocated, merged_only, both, by_flops, folded, twice, live, baked)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", MADE)
def test_comes_back(make, inplace, path):
    model = make(drawn(Net()))
    loaded = reloaded(model, drawn(Net(), 1), path, inplace=inplace)
    assert_same(loaded, model, *pictures(model))


def test_these_round_trips_have_everything_in_them():
    """Rewritten methods, sums, borders, norms, padding that moved, and live kernels."""
    net = drawn(Net())
    assert any(site.function for site in nmconv.get_plan(both(net)).changes)
    merges = [merge for make in MADE[3:] for part in nmconv.get_merges(make(net)) for merge in part]
    assert any(merge.sums for merge in merges)
    assert any(merge.geometry.bounded for merge in merges)
    assert any(len(merge.convs) == 1 and merge.removed for merge in merges)
    assert any(merge.live for merge in merges)
    assert any(not hoist.why for hoist in nmconv.get_plan(relocated(net)).hoists)
    assert [len(nmconv.get_merges(make(net))) for make in (converted, folded, twice, baked)] == [0, 1, 2, 1]


@pytest.mark.parametrize("make", MADE)
def test_mode_dtype_and_device_are_the_pristine_models(make, path):
    model = make(drawn(Net()))
    loaded = reloaded(model, drawn(Net(), 1).train(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.FoldedNormWarning)
        assert_same(loaded, model, *pictures(model))
    double = reloaded(model, drawn(Net(), 1).double(), path)
    for name, value in double.state_dict().items():
        assert value.dtype in (torch.float64, torch.int64, torch.bool)
        assert torch.equal(value, model.state_dict()[name].to(value.dtype))


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("inplace", [False, True])
def test_pristine_on_meta(make, inplace, path):
    """Parameters are made on the CPU, and tied ones stay tied; the buffer that no state dict holds is given."""
    model = make(drawn(Net()))
    with torch.device("meta"):
        pristine = Net()
    pristine.mean = torch.ones(3, 1, 1)
    pristine.stem.weight.marked = True
    loaded = reloaded(model, pristine, path, inplace=inplace).eval()
    assert loaded.tied.weight is loaded.head.weight
    assert not any(value.is_meta for value in tensors_of(loaded))
    assert {name: value.requires_grad for name, value in loaded.named_parameters()} == {
        name: value.requires_grad for name, value in model.named_parameters()
    }
    if inplace and make is neither:
        assert loaded.stem.weight.marked
    assert_same(loaded, model, *pictures(model))


def test_meta_buffers_that_no_file_holds(path):
    nmconv.save(both(drawn(Net())), path)
    with torch.device("meta"):
        pristine = Net()
    for inplace in (False, True):
        before = snapshot(pristine)
        with pytest.raises(nmconv.ModelTypeError, match="'mean' is on the meta device"):
            nmconv.load(pristine, path, inplace=inplace)
        assert snapshot(pristine) == before


@pytest.mark.parametrize("make", [converted, both, live])
def test_bf16(make, path):
    model = make(drawn(Net()).bfloat16())
    loaded = reloaded(model, drawn(Net(), 1).bfloat16(), path)
    assert_same(loaded, model, *pictures(model))
    wide = nmconv.load(drawn(Net(), 1), path)
    assert all(
        torch.equal(value, model.state_dict()[name].to(value.dtype)) for name, value in wide.state_dict().items()
    )


def test_storage_is_written_once(path):
    """Tied weights by name, parts of other tensors by themselves, and what is not contiguous made so."""
    net = drawn(Net()).to(memory_format=torch.channels_last)
    assert not net.stem.weight.is_contiguous()
    nmconv.save(net, path)
    data = path.read_bytes()
    assert said(data)["aliases"] == [["tied.weight", "head.weight"]]
    assert "tied.weight" not in parts_of(data)[0]
    assert held(data) == state(net)
    loaded = reloaded(net, Net().to(memory_format=torch.channels_last), path)
    assert not loaded.stem.weight.is_contiguous()
    assert_same(loaded, net, *pictures(net))


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(24.0).reshape(4, 6)
        views = {"whole": whole, "again": whole, "row": whole[1], "column": whole[:, 2], "turned": whole.t()}
        views |= {"wide": torch.zeros(1).expand(5), "empty": whole[:0], "nothing": torch.zeros(0)}
        for name, value in (views | {"scalar": whole[3, 5]}).items():
            self.register_buffer(name, value)


def test_views(path):
    views = Views()
    nmconv.save(views, path)
    assert said(path.read_bytes())["aliases"] == [["again", "whole"]]
    pristine = Views()
    pristine.wide = torch.zeros(5)  # torch itself loads into no expanded tensor
    assert state(nmconv.load(pristine, path)) == state(views)


def test_bytes_are_the_same_each_time(path, tmp_path):
    model = both(drawn(Net()))
    nmconv.save(model, path)
    nmconv.save(nmconv.load(Net(), path), tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_metadata_is_readable_without_nmconv(path):
    model = both(drawn(Net()))
    nmconv.save(model, path)
    with safetensors.safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["nmconv"])
    assert (found["format"], found["nmconv"], found["model"]) == (6, nmconv.__version__, "Net")
    assert nmconv.Plan.from_json(json.dumps(found["plan"])) == nmconv.get_plan(model)
    assert [merge["head"] for merge in found["merges"][0]] == [merge.head for merge in nmconv.get_merges(model)[0]]


def test_get_merges():
    assert nmconv.get_merges(Net()) == ()
    with pytest.raises(nmconv.ModelTypeError):
        nmconv.get_merges("net")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::nmconv.NoEffectWarning")
@pytest.mark.parametrize(
    ("name", "options", "merging"),
    [
        ("timm/tf_efficientnet_lite0", {"ratio": "3:1", "hoist_padding": True}, {"gate": "always"}),
        ("timm/mobilenetv2_050", {"ratio": "3:1", "relocate": True, "hoist_padding": True}, {}),
        ("timm/repvgg_a0", {"ratio": "2:1"}, {}),
        pytest.param("timm/densenet121", {"ratio": "2:1"}, {}, marks=pytest.mark.slow),
        ("timm/resnetv2_18", {"ratio": "2:1"}, {"live": True, "gate": "always"}),
        ("torchvision/googlenet", {"ratio": "3:1"}, {"gate": "always"}),
        ("torchvision/resnet18", None, {}),
        ("timm/convnext_atto", {"ratio": "2:1", "linear": True}, None),
    ],
)
def test_networks(name, options, merging, path):
    torch.manual_seed(0)
    model, pristine = zoo.build(name).eval(), zoo.build(name)
    zoo.randomize(model)
    if options is not None:
        model = nmconv.convert(model, **options)
    if merging is not None:
        model = nmconv.merge(model, **merging)
    nmconv.save(model, path)
    loaded = nmconv.load(pristine, path).eval()
    assert nmconv.get_plan(loaded) == nmconv.get_plan(model)
    assert nmconv.get_merges(loaded) == nmconv.get_merges(model)
    x = torch.rand(1, 3, 96, 65)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("make", MADE)
def test_devices(make, path):
    model = make(drawn(Net()).cuda())
    there = reloaded(model, drawn(Net(), 1).cuda(), path)
    assert all(value.is_cuda for value in tensors_of(there))
    assert state(there) == state(nmconv.load(Net(), path)) == state(model)


def test_example_inputs_and_untraced_parts(path):
    """A plan that was made with examples is done again without them."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Rep(3, nn.ReLU())
            self.more = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU())

        def forward(self, x: Tensor, scale: int) -> Tensor:
            if scale > 1:
                x = F.interpolate(x, scale_factor=scale)
            return self.more(self.body(x))

    net = drawn(Branching())
    x = torch.rand(2, 3, 8, 8)
    model = nmconv.merge(
        nmconv.convert(net, example_inputs=(x, 2), keep="boundary"), gate="always", example_inputs=(x, 2)
    )
    assert nmconv.get_merges(model)[0]
    loaded = reloaded(model, Branching(), path, example_inputs=(x, 2)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x, 2), model(x, 2))


class Deep(nn.Module):
    """Activations in methods other than forward, called from elsewhere and by a name that is put together."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.two = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "last")(helped(self, x))  # noqa: B009

    def first(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x))

    def last(self, x: Tensor) -> Tensor:
        return F.relu(self.two(x))


def helped(module: Deep, x: Tensor) -> Tensor:
    return module.first(x)


def test_methods_that_a_forward_calls_may_be_rewritten(path):
    model = nmconv.convert(drawn(Deep()), keep="boundary")
    calls = calls_of(drawn(Deep()), nmconv.get_plan(model)).values()
    assert {call.method for call in calls} == {"first", "last"}
    assert_same(reloaded(model, Deep(), path), model, torch.rand(2, 3, 8, 8))


# What save and load refuse -------------------------------------------------------------------------------------------


def test_save_refuses(path):
    class Extra(nn.Module):
        def get_extra_state(self) -> Any:
            return {"any": "thing"}

        def set_extra_state(self, state: Any) -> None:
            pass

    half = Net()
    half.rep = nmconv.fold_norms(half.rep.eval())
    with torch.device("meta"):
        nowhere = Net()
    sparse = nn.Module()
    sparse.register_buffer("some", torch.eye(3).to_sparse())
    wide = nn.Module()
    wide.register_buffer("some", torch.zeros(2, dtype=torch.complex128))
    for model, text in (
        (Extra(), "_extra_state.* is a dict"),
        (nn.LazyConv2d(3, 1), "no shape yet"),
        (half, "'rep' in the model was converted or merged by itself"),
        (nowhere, "no numbers"),
        (sparse, "sparse"),
        (wide, "complex128"),
        (nn.DataParallel(Net()), "DataParallel"),
        ("net", "not an nn.Module"),
    ):
        with pytest.raises(nmconv.ModelTypeError, match=text):
            nmconv.save(model, path)  # type: ignore[arg-type]
        assert not list(path.parent.iterdir())


def test_models_compiled_in_place_are_saved(path):
    model = both(drawn(Net()))
    model.compile()
    nmconv.save(model, path)
    assert state(nmconv.load(Net(), path)) == state(model)


def test_load_refuses_models_that_are_not_pristine(path):
    nmconv.save(both(drawn(Net())), path)
    net = drawn(Net())
    for model in (converted(net), folded(net), merged_only(net), nn.Sequential(folded(net))):
        before = snapshot(model)
        with pytest.raises(nmconv.AlreadyConvertedError, match="load into the original"):
            nmconv.load(model, path, inplace=True)
        assert snapshot(model) == before
    with pytest.raises(nmconv.ModelTypeError):
        nmconv.load("net", path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        torchvision.models.resnet18,
        lambda: timm.create_model("resnet10t"),
        lambda: Rep(4, nn.ReLU()),
        nn.Identity,
        lambda: _changed(lambda net: setattr(net, "act", nn.GELU())),
        lambda: _changed(lambda net: setattr(net, "head", nn.Linear(4, 4, bias=False))),
        lambda: _changed(lambda net: setattr(net, "deep", nn.Conv2d(8, 8, 3, padding=1, groups=4))),
        lambda: _changed(lambda net: setattr(net, "more", nn.Conv2d(8, 8, 3))),
        lambda: _changed(lambda net: net.register_buffer("flag", torch.tensor(1.0))),
        lambda: _changed(lambda net: net.register_buffer("whole", torch.zeros(7))),
    ],
)
@pytest.mark.parametrize("make", MADE)
def test_other_models(make, other, path):
    """One that differs in anything that is in the file; an activation is not, where nothing was converted."""
    nmconv.save(make(drawn(Net())), path)
    model = other().eval()
    before = snapshot(model)
    if isinstance(getattr(model, "act", None), nn.GELU) and make in (neither, merged_only):
        nmconv.load(model, path)
        return
    for inplace in (False, True):
        with pytest.raises(nmconv.FileError, match=r"net\.safetensors: .*; give the model that was saved"):
            nmconv.load(model, path, inplace=inplace)
        assert snapshot(model) == before


def _changed(change: Callable[[Net], object]) -> Net:
    net = Net()
    change(net)
    return net


def test_one_tensor_there_and_two_here(path):
    """A file cannot fill one parameter with two values."""
    net = drawn(Net())
    net.tied.weight = nn.Parameter(torch.rand(4, 4))
    nmconv.save(net, path)
    with pytest.raises(nmconv.FileError, match="one tensor in this model and two"):
        nmconv.load(Net(), path)
    nmconv.save(Net(), path)
    assert "tied.weight" in state(nmconv.load(net, path))


def test_overlapping_here_and_contradicting_there(path):
    net = drawn(Net())
    net.part = torch.tensor([math.nan, -0.0])
    nmconv.save(net, path)
    pristine = drawn(Net(), 1)
    before = snapshot(pristine)
    for inplace in (False, True):
        with pytest.raises(nmconv.FileError, match="'whole', 'part' share memory in this model and contradict"):
            nmconv.load(pristine, path, inplace=inplace)
        assert snapshot(pristine) == before
    net.whole[2:4] = net.part
    nmconv.save(net, path)
    assert state(nmconv.load(pristine, path)) == state(net)


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(FileNotFoundError):
        nmconv.load(Net(), tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        nmconv.load(Net(), tmp_path)
    with pytest.raises(nmconv.FileError, match=r"none/net' cannot be written: its folder does not exist"):
        nmconv.save(Net(), tmp_path / "none" / "net")


# Bad files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "net"
    nmconv.save(twice(drawn(Net())), path)
    return path.read_bytes()


def refused(data: bytes, path: Path, text: str = "; ") -> str:
    """Load it into a net, which stays as it was; what the error says."""
    path.write_bytes(data)
    pristine = drawn(Net(), 1)
    before = snapshot(pristine)
    for inplace in (False, True):
        with pytest.raises(nmconv.FileError, match=text) as caught:
            nmconv.load(pristine, path, inplace=inplace)
        assert snapshot(pristine) == before
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message) < 1500
    return message


def test_damaged_files(good, path):
    length = struct.unpack("<Q", good[:8])[0]
    for data in (
        b"",
        b"\x80\x04}.",
        good[:7],
        good[:8],
        good[: 8 + length - 1],
        good[: 8 + length],
        good[:-1],
        good + b"\0",
        struct.pack("<Q", 2**63) + good[8:],
        struct.pack("<Q", 2**40) + good[8:],
        struct.pack("<Q", length - 1) + good[8:],
        random.Random(0).randbytes(4096),
        b"\0" * 4096,
    ):
        assert "copy it again, or save the model again" in refused(data, path, "not a complete safetensors file")


def test_files_of_others(good, path):
    header, body = parts_of(good)
    for metadata in (None, {}, {"format": "pt"}):
        other = {**header, "__metadata__": metadata} if metadata is not None else dict(header)
        if metadata is None:
            del other["__metadata__"]
        refused(file_of(other, body), path, "not one that nmconv.save wrote")


def test_other_versions(good, path):
    text = refused(
        edited(good, lambda it: it.update(format=7, nmconv="7.1")), path, "format 7, and this nmconv reads 6"
    )
    assert "written by nmconv 7.1" in text
    assert "install the version" in text
    refused(edited(good, lambda it: it["plan"].update(nmconv_plan=99)), path, "version 99")


@pytest.mark.parametrize(
    "content",
    [
        *("", "null", "[]", "{}", "1", '"x"', "nonsense", "[" * 100_000, '{"a":' * 100_000, '{"format": 2}'),
        *('{"format": true}', '{"format": "1"}', '{"format": 1.0}', '{"format": 1e999}', '{"format": NaN}'),
        '{"format": ' + "1" * 5000 + "}",
        " " * (2**24 + 1),
    ],
)
def test_metadata_that_is_none(good, path, content):
    refused(saying(good, content), path)


def test_deep_nesting_inside(good, path):
    text = json.dumps(said(good))
    for spot in ('"plan": {', '"merges": [', '"aliases": ['):
        for deep in ("[" * 100_000 + "]" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900):
            assert spot in text
            refused(saying(good, text.replace(spot, f'"x": {deep}, {spot}')), path)
            refused(saying(good, text.replace(spot, f"{spot[:-1]}{deep}, " + f'"y": {spot[-1]}')), path)


def put(*keys: Any) -> Callable[[Any], Callable[[Any], None]]:
    """Something that puts a value at a place."""

    def putting(value: Any) -> Callable[[Any], None]:
        def change(content: Any) -> None:
            for key in keys[:-1]:
                content = content[key]
            assert keys[-1] in content or isinstance(content, list) or keys[0] == "plan"
            content[keys[-1]] = value

        return change

    return putting


WRONG = (None, True, -1, 0, 0.5, math.nan, 2**31, 2**63, 10**4000, "x", [], {}, [[]])
# Places where nearly nothing will do, and what will.
PLACES: dict[tuple[Any, ...], tuple[Any, ...]] = {
    ("format",): (True,),
    ("merges",): (),
    ("aliases",): (),
    ("model",): ("x",),
    ("merges", 0): (),
    ("merges", 0, 0): (),
    ("merges", 0, 0, "head"): (),
    ("merges", 0, 0, "trainable"): (True,),
    ("merges", 0, 0, "convs"): (),
    ("merges", 0, 0, "removed"): (),
    ("merges", 0, 0, "live"): (),
    ("merges", 0, 0, "norm"): (),
    ("merges", 0, 0, "geometry"): (),
    **{("merges", 0, 0, "geometry", name): () for name in ("in_channels", "out_channels", "groups")},
    **{("merges", 0, 0, "geometry", name): () for name in ("kernel", "stride", "dilation", "padding", "mode")},
    ("merges", 0, 0, "geometry", "stages"): ([],),
    ("merges", 0, 0, "geometry", "bounded"): ([],),
    ("merges", 0, 0, "geometry", "bias"): (True,),
    ("merges", 0, 0, "geometry", "kernel", 0): (),
    ("merges", 0, 0, "geometry", "stride", 0): (),
    ("merges", 0, 0, "geometry", "dilation", 1): (),
    ("merges", 0, 0, "geometry", "padding", 0, 1): (0,),
    ("plan",): (None,),
    ("plan", "fingerprint"): (),
    ("plan", "sites", 0, "site"): (),
    ("plan", "sites", 0, "action"): (),
    ("plan", "call"): (None,),
}


@pytest.mark.parametrize("place", PLACES)
def test_wrong_values(good, path, place):
    """Whatever stands there, it is refused, or it is what was loaded."""
    for value in WRONG:
        if any(type(value) is type(fine) and value == fine for fine in PLACES[place]):
            continue
        if place == ("plan",) and value is None:
            continue
        refused(edited(good, put(*place)(value)), path)


def merge_with(content: Any, wanted: Callable[[Any], bool]) -> Any:
    return next(merge for part in content["merges"] for merge in part if wanted(merge))


def geometry(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["merges"][-1][-1]["geometry"].update(changes)


def of_sum(**changes: Any) -> Callable[[Any], None]:
    return lambda content: merge_with(content, lambda merge: merge["sums"])["sums"][0].update(changes)


def of_site(**changes: Any) -> Callable[[Any], None]:
    """Change a site that is dropped."""

    def change(content: Any) -> None:
        site = next(s for s in content["plan"]["sites"] if s["action"] == "drop")
        site.update(changes)

    return change


def of_merge(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["merges"][-1][-1].update(changes)


STAGE = {"extent": 3, "stride": 1, "left": -1, "right": -1}
HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "huge kernel": (geometry(kernel=[100_000, 100_000]), "shape|extent|weights"),
    "huger kernel": (geometry(kernel=[2**30, 2**30]), "weights"),
    "huge extent": (geometry(dilation=[2**31 - 1] * 2, kernel=[3, 3]), "extent"),
    "huge channels": (geometry(in_channels=2**31 - 1, groups=1), "channels in"),
    "groups that do not divide": (geometry(groups=3), "groups"),
    "other rank": (geometry(kernel=[1], stride=[1], dilation=[1], padding=[[0, 0]]), "axes"),
    "rank of nothing": (geometry(kernel=[], stride=[], dilation=[], padding=[]), "spatial axes"),
    "rank four": (geometry(kernel=[1] * 4, stride=[1] * 4, dilation=[1] * 4, padding=[[0, 0]] * 4), "spatial axes"),
    "mixed ranks": (geometry(padding=[[0, 0]]), "padding for 1 of 2"),
    "unknown mode": (geometry(mode="__import__('os')"), "mode"),
    "stage of stride zero": (geometry(stages=[[{**STAGE, "stride": 0}], []], padding=[[0, 0]] * 2), "stage"),
    "stage of no extent": (geometry(stages=[[{**STAGE, "extent": -3}], []], padding=[[0, 0]] * 2), "stage"),
    "half a stage": (geometry(stages=[[{**STAGE, "right": 4}], []], padding=[[0, 0]] * 2), "stage"),
    "too many stages": (geometry(stages=[[STAGE] * 5000, []], padding=[[0, 0]] * 2), "5000 stages"),
    "stages and padding": (geometry(stages=[[STAGE], []], padding=[[1, 1]] * 2), "both"),
    "stages of huge strides": (geometry(stages=[[{**STAGE, "stride": 2**16}] * 3, []], padding=[[0, 0]] * 2), "stride"),
    "bounded by half": (geometry(bounded=[True]), "bounded"),
    "bounded by nothing": (geometry(bounded=[False, False]), "bounded"),
    "a border that is not there": (geometry(bounded=[True, True], mode="zeros"), "border|shape"),
    "a head outside": (of_merge(head="other", convs=["other"]), "does not have"),
    "a head that is none": (of_merge(head="act", convs=["act"], removed=[]), "which is a"),
    "the model itself": (of_merge(head="", convs=[""], removed=[]), "which is a"),
    "a property": (of_merge(head="__class__", convs=["__class__"], removed=[]), "does not have"),
    "a path": (of_merge(head="rep.act.__init__", convs=["rep.act.__init__"], removed=[]), "does not have"),
    "removing an activation": (of_merge(removed=["rep.act"]), "does not remove|which is a"),
    "removing a block": (of_merge(removed=["rep"]), "does not remove|which is a"),
    "a norm that stays and goes": (
        lambda content: of_merge(norm=content["merges"][-1][-1]["head"])(content),
        "removes",
    ),
    "a norm that is none": (of_merge(norm="rep.act"), "which is a"),
    "a norm outside": (of_merge(norm="other"), "does not have"),
    "sum of an unknown owner": (of_sum(owner="nobody"), "does not have"),
    "sum of a leaf": (of_sum(owner="stem"), "cannot be done|not in stem"),
    "sum of another name": (of_sum(label="__class__"), "not in rep.forward"),
    "sum number none": (of_sum(number=0), "number 0"),
    "sum number many": (of_sum(number=2**62), "not in rep.forward"),
    "a third operand": (of_sum(keep=2), "operand 2"),
    "a sum with arguments": (of_sum(takes='[["T"], {}]'), "unknown fields"),
    "a method": (of_site(method="restore"), "unknown fields"),
    "code in a guard": (
        of_merge(guards=[{"owner": "head", "argument": "__import__('os').abort()", "value": "1"}]),
        "no argument",
    ),
    "code behind a flag": (
        of_merge(guards=[{"owner": "head", "argument": "self.x or __import__('os').abort()", "value": "1"}]),
        "no argument",
    ),
    "a guard that is no JSON": (of_merge(guards=[{"owner": "head", "argument": "x", "value": "{"}]), "cannot be done"),
    "a guard of nobody": (of_merge(guards=[{"owner": "nobody", "argument": "x", "value": "1"}]), "does not have"),
    "a closed forward": (of_merge(closed=["forward"]), "closes"),
    "a closed method of Module's": (of_merge(closed=["state_dict"]), "closes"),
    "a site's owner": (of_site(owner="__class__"), "repeats what its id says"),
    "a site elsewhere": (of_site(site="__class__:relu#1"), "does not make"),
    "a site's call": (of_site(site="rep.act#-5"), "not a site's id"),
    "a site of a function": (of_site(site="rep:__class__#1"), "does not make"),
    "a call that no model takes": (lambda content: content["plan"].update(call={"args": []}), "cannot be called"),
    "a huge call": (lambda content: content["plan"].update(call={"args": [{"shape": [2**40]}]}), "shape"),
    "another fingerprint": (lambda content: content["plan"].update(fingerprint="0" * 16), "fingerprint"),
    "no merges": (lambda content: content.update(merges=[]), "lacks"),
    "a round twice": (lambda content: content["merges"].append(content["merges"][-1]), "; "),
    "a merge twice": (lambda content: content["merges"][-1].append(content["merges"][-1][-1]), "twice|once"),
    "an alias of nothing": (lambda content: content.update(aliases=[["tied.weight", "nothing"]]), "contradict"),
    "an alias of itself": (lambda content: content.update(aliases=[["tied.weight", "tied.weight"]]), "contradict"),
    "an alias of another": (lambda content: content.update(aliases=[["tied.weight", "head.bias"]]), "shape"),
    "an alias that is there": (lambda content: content["aliases"].append(["head.bias", "head.weight"]), "contradict"),
    "an alias of a name that is not": (lambda content: content["aliases"].append(["more", "head.weight"]), "too many"),
    "hoisting elsewhere": (
        lambda content: content["plan"].setdefault("hoists", []).append({"convs": ["no", "stem"]}),
        "cannot move",
    ),
    "hoisting nonsense": (
        lambda content: content["plan"].setdefault("hoists", []).append({"convs": ["stem"], "geometries": []}),
        "unknown fields",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(good, path, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    change, text = HOSTILE[name]
    refused(edited(good, change), path, text)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing that the file named was written


def test_live_factors(path):
    nmconv.save(live(drawn(Net())), path)
    data = path.read_bytes()
    factors = said(data)["merges"][0][0]["factors"]
    assert factors
    for other in ("", "[]", "null", "[" * 60_000, '[["conv", "head"]]', '[["conv", "__class__"]]', "[[1, 2]]", "[5]"):
        refused(edited(data, lambda content, other=other: content["merges"][0][0].update(factors=other)), path)
    refused(edited(data, lambda content: content["merges"][0][0].update(live=False)), path)
    refused(edited(data, lambda content: content["merges"][0][0]["geometry"].update(kernel=[5, 5])), path)


def test_tensors_that_do_not_fit(good, path):
    def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
        header, body = parts_of(good)
        change(header)
        return file_of(header, body)

    def rename(header: dict[str, Any]) -> None:
        header["head.bais"] = header.pop("head.bias")

    for change, text in (
        (rename, "lacks 'head.bias' and has 'head.bais' too many"),
        (lambda header: header["head.weight"].update(shape=[16]), "'head.weight' has the shape"),
        (lambda header: header["head.bias"].update(dtype="I32"), "'head.bias' has the type"),
        (lambda header: header["flag"].update(dtype="U8"), "'flag' has the type"),
        (lambda header: header["head.bias"].update(dtype="F8_E8M0", shape=[16]), "type F8_E8M0|not a complete"),
        (lambda header: header["head.bias"].update(shape=[2**62, 2**62]), "not a complete safetensors"),
        (lambda header: header["head.bias"].update(data_offsets=[0, 2**63]), "not a complete safetensors"),
    ):
        refused(changed(change), path, text)


def test_the_state_is_loaded_strictly(good, path):
    header, body = parts_of(good)
    refused(file_of({**header, "more": {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}},
                    body + b"\0" * 4), path, "has 'more' too many")  # fmt: skip


# Writing as a whole --------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """What Ctrl-C raises, but not for pytest."""


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


def half_written(tensors: Any, name: str, *args: Any) -> None:
    Path(name).write_bytes(b"half")
    raise safetensors.SafetensorError("I/O error: No space left on device")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("spot", "replacement", "error"),
    [
        ("os.replace", failing(OSError("no")), OSError),
        ("os.replace", failing(Stop()), Stop),
        ("os.fsync", failing(OSError("full")), OSError),
        ("nmconv.io.saving.save_file", half_written, nmconv.FileError),
        ("nmconv.io.saving.save_file", failing(Stop()), Stop),
        ("nmconv.io.saving.save_file", failing(MemoryError()), MemoryError),
    ],
)
def test_writing_is_atomic(path, monkeypatch, spot, replacement, error, there):
    if there:
        path.write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(spot, replacement)
        with pytest.raises(error):
            nmconv.save(Net(), path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == ({path.name: b"old"} if there else {})
    nmconv.save(Net(), path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_written_is_on_the_disk_before_it_takes_the_place(path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr("os.replace", lambda one, other: (done.append("replace"), replace(one, other)))
    nmconv.save(Net(), path)
    assert done[:2] == ["sync", "replace"]


def test_permissions_and_links_stay(path, tmp_path):
    nmconv.save(Net(), path)
    other = tmp_path / "plain"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path.name)
    nmconv.save(Net(), link)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink()
    assert nmconv.load(Net(), link)


def test_relative_paths_and_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nmconv.save(Net(), "here")
    assert nmconv.load(Net(), "here")
    assert [file.name for file in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("error", [RuntimeError("no"), Stop(), MemoryError()])
@pytest.mark.parametrize(
    "spot",
    [
        "nmconv.io.replaying.make_changes",
        "nmconv.io.replaying.install",
        "nmconv.io.loading.sources_of",
        "nmconv.io.state._with_memory",
        "torch.nn.Module.load_state_dict",
        "torch.nn.modules.batchnorm._NormBase._load_from_state_dict",
        "torch.nn.Linear._load_from_state_dict",
    ],
)
def test_interrupted_loading_changes_nothing(path, monkeypatch, spot, error):
    """Wherever it is stopped, even when half of the weights are in."""
    model = (live if "batchnorm" in spot else both)(drawn(Net()))
    nmconv.save(model, path)
    pristine = drawn(Net(), 1).train()
    pristine.stem.weight.requires_grad_(False)
    before = snapshot(pristine)
    with monkeypatch.context() as patched:
        patched.setattr(spot, failing(error))
        with pytest.raises((type(error), nmconv.FileError)):
            nmconv.load(pristine, path, inplace=True)
    assert snapshot(pristine) == before
    assert_same(nmconv.load(pristine, path, inplace=True), model)


def test_inplace_keeps_parameters(path):
    """Optimizers go on holding what they held."""
    model = converted(drawn(Net()))
    nmconv.save(model, path)
    pristine = Net()
    before = dict(pristine.named_parameters())
    assert {name: value is before[name] for name, value in nmconv.load(pristine, path, inplace=True).named_parameters()}
    assert all(value is before[name] for name, value in pristine.named_parameters())


# Mutants -------------------------------------------------------------------------------------------------------------


def test_some_mutants():
    found = mutants.check(300, 1)
    assert found["refused"] > 150
    assert found["loaded"] > 15


@pytest.mark.slow
def test_ten_thousand_mutants():
    """In a process of its own, which has little memory."""
    command = [sys.executable, "-W", "ignore", mutants.__file__, "10000"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"] > 5000
    assert found["loaded"] > 500
    assert found["grown_kib"] < 200_000
