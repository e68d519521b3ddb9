"""Old names of arguments and old words for options: they do what the new ones do, and say so."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import nmconv


def network():
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*parts).eval()


def pictures():
    return torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))


OLD = {"net": "model", "images": "data", "most": "max_convs"}


def test_sensitivity_takes_old_names():
    with pytest.warns(DeprecationWarning) as warned:
        old = nmconv.sensitivity(net=network(), images=pictures(), most=1, quiet=True)
    new = nmconv.sensitivity(model=network(), data=pictures(), max_convs=1, quiet=True)
    assert old == new and old.setting["max_convs"] == "1"
    assert [str(each.message) for each in warned] == [
        f"sensitivity(): the argument {old!r} is called {new!r} now" for old, new in OLD.items()
    ]
    assert {each.filename for each in warned} == {__file__}  # the user's line, not ours


def test_search_takes_old_names():
    with pytest.warns(DeprecationWarning, match="'most' is called 'max_convs'"):
        old = nmconv.search(network(), pictures(), budget=0.99, cost="activations", most=2, quiet=True)
    new = nmconv.search(network(), pictures(), budget=0.99, cost="activations", max_convs=2, quiet=True)
    assert old == new
    with pytest.warns(DeprecationWarning, match=r"^search\(\): the argument 'net' is called 'model' now$"):
        assert new == nmconv.search(net=network(), data=pictures(), budget=0.99, cost="activations", max_convs=2)


@pytest.mark.parametrize("call", [nmconv.search, nmconv.sensitivity])
def test_an_argument_under_both_names_is_refused(call):
    with pytest.raises(TypeError, match="got 'most' and 'max_convs': 'most' is the old name"):
        call(network(), pictures(), budget=0.9, most=2, max_convs=3)
    with pytest.raises(TypeError, match="multiple values for argument 'model'"), pytest.warns(DeprecationWarning):
        call(network(), net=network(), data=pictures())
    with pytest.raises(TypeError, match="unexpected keyword argument 'mots'"):
        call(network(), pictures(), mots=2)


@pytest.mark.parametrize("call", [nmconv.search, nmconv.sensitivity])
def test_signatures_show_the_new_names_only(call):
    names = list(inspect.signature(call).parameters)
    assert names[:2] == ["model", "data"] and "max_convs" in names and not set(OLD) & set(names)


@pytest.mark.parametrize("call", [nmconv.make_plan, nmconv.convert])
def test_keep_takes_its_old_word(call):
    with pytest.warns(DeprecationWarning, match="^keep='last' is called 'boundary' now$") as warned:
        old = call(network(), "2:1", keep="last")
    assert [each.filename for each in warned] == [__file__]
    new = call(network(), "2:1", keep="boundary")
    plans = [each if isinstance(each, nmconv.Plan) else nmconv.get_plan(each) for each in (old, new)]
    assert plans[0] == plans[1] == nmconv.make_plan(network(), "2:1", keep="boundary")
    assert dict(plans[0].options)["keep"] == "boundary"


def test_the_boundary_is_in_front_where_activations_stand_before_convolutions():
    parts = [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)]
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), *parts, nn.Flatten())
    example = torch.zeros(2, 4, 5, 5)
    at_boundary = nmconv.make_plan(model, "2:1", keep="boundary", example_inputs=example)
    other_end = nmconv.make_plan(model, "2:1", keep="first", example_inputs=example)
    assert [site.action for site in at_boundary.sites] == ["keep", "drop"]
    assert [site.action for site in other_end.sites] == ["drop", "keep"]


def test_a_plan_with_the_old_word_loads_and_is_applied():
    plan = nmconv.make_plan(network(), "2:1", keep="boundary")
    text = plan.to_json()
    assert text.count('"boundary"') == 1
    old = nmconv.Plan.from_json(text.replace('"boundary"', '"last"'))
    assert old == plan
    x = pictures()
    assert torch.equal(nmconv.apply_plan(network(), old)(x), nmconv.apply_plan(network(), plan)(x))


def test_a_table_with_the_old_word_loads_and_goes_on(tmp_path):
    path = tmp_path / "table.json"
    table = nmconv.sensitivity(network(), pictures(), max_convs=2, quiet=True, path=path)
    data = json.loads(path.read_text())
    data["setting"]["most"] = data["setting"].pop("max_convs")
    path.write_text(json.dumps(data))
    assert nmconv.Sensitivity.load(path) == table
    assert nmconv.sensitivity(network(), pictures(), max_convs=2, quiet=True, path=path) == table
    with pytest.raises(nmconv.FileError, match="measured with max_convs '2', not '1'"):
        nmconv.sensitivity(network(), pictures(), max_convs=1, quiet=True, path=path)


def test_the_command_line_takes_the_old_word(tmp_path):
    script = "import timm\ntimm.create_model('test_resnet', num_classes=3)\n"
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "nmconv.run", "--keep"]
    for word in ("last", "boundary"):
        done = subprocess.run([*command, word, "--", "script.py"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("keep='last' is called 'boundary' now" in done.stderr) == (word == "last"), done.stderr


def other(*parts):
    """A model in which nothing changes at 2:1, or a PReLU goes."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), *parts, nn.AdaptiveAvgPool2d(1)).eval()


@pytest.mark.parametrize(
    ("category", "call"),
    [
        (nmconv.NoEffectWarning, lambda: nmconv.convert(other(nn.ReLU()), "2:1")),
        (nmconv.NoEffectWarning, lambda: nmconv.merge(other(nn.ReLU()))),
        (nmconv.SlopeWarning, lambda: nmconv.Gradual(nmconv.convert(network(), "2:1", gradual=True), 10).finish()),
        (
            nmconv.RestoredParametersWarning,
            lambda: nmconv.restore(
                nmconv.convert(other(nn.PReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()), "2:1", keep="boundary")
            ),
        ),
        (
            nmconv.RemovedParametersWarning,
            lambda: nmconv.merge(other(nn.Conv2d(4, 4, 1)), gate="always", inplace=True),
        ),
    ],
)
def test_warnings_name_the_users_line(category, call):
    with pytest.warns(category) as warned:
        call()
    assert {each.filename for each in warned if each.category is category} == {__file__}


def test_the_gate_flops_is_called_multiply_adds():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)).eval()
    with pytest.warns(DeprecationWarning, match=r"^gate='flops' is called 'multiply_adds' now$") as warned:
        old = nmconv.merge(model, gate="flops")
    assert warned[0].filename == __file__
    assert nmconv.get_merges(old) == nmconv.get_merges(nmconv.merge(model, gate="multiply_adds"))
