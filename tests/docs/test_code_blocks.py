"""Every code block of README.md and docs/ does what it says it does: Python is run, command lines are parsed."""

import argparse
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch

import nmconv

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
ELSEWHERE = {"training.md": "tests/surgery/test_gradual.py", "ensemble.md": "tests/analysis/test_ensemble.py"}
SMALL = {"resnet50": "test_resnet", "mobilenetv2_100": "mobilenetv2_035"}
real = timm.create_model


def create_model(name, pretrained=False, **options):
    """A smaller model in place of a large one, without a download; in eval mode, with running statistics of its own."""
    torch.manual_seed(0)
    model = real(SMALL.get(name, name), **options)
    model.train()(torch.randn(4, 3, 32, 32))
    return model.eval()


def blocks(page, *languages):
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [text for language, text in found if language in languages]


def names(page):
    """What a page takes for granted."""
    if page.name == "files.md":
        model = nmconv.convert(create_model("mobilenetv2_100"), "3:1", relocate=True, hoist_padding=True)
        return {"nmconv": nmconv, "timm": timm, "model": nmconv.merge(model)}
    model, generator = create_model("resnet50"), torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 10
    return {
        "nmconv": nmconv,
        "torch": torch,
        "timm": timm,
        "model": model,
        "converted": nmconv.convert(model, "2:1"),
        "images": images,
        "loader": [(images, labels)],
        "optimizer": torch.optim.SGD(model.parameters(), 1e-3),
        "loss_function": torch.nn.functional.cross_entropy,
    }


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    if page.name in ELSEWHERE:
        assert f'"{page.name}"' in (ROOT / ELSEWHERE[page.name]).read_text()
        return
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", create_model)
    space = names(page)
    if page.name == "README.md":
        space = {"images": space["images"]}  # it names everything else itself
    for number, block in enumerate(blocks(page, "python")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nmconv.SlopeWarning)  # no training in between
            exec(compile(block, f"{page.name}, block {number + 1}", "exec"), space)


class Parsed(Exception):
    """A command line was accepted."""


def commands(page):
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = ["0" if word == "S" else word for word in shlex.split(line, comments=True)]  # S: a seed
            if words:
                yield words


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_command_lines_are_accepted(page, words, monkeypatch):
    if words[0] == "make":
        assert re.search(rf"(?m)^{words[1]}:", (ROOT / "Makefile").read_text())
        return
    if words[:2] == ["pip", "install"] or words[0] == "export":
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    assert words[0] == "python", f"{page}: a command that this test does not know: {words}"
    if words[1:4] == ["-m", "nmconv", "bench"]:
        pytest.importorskip("typer")
        from typer.main import get_command

        from nmconv.bench.command import app

        assert get_command(app).commands["bench"].make_context("bench", words[4:])
        return
    with pytest.raises(Parsed):
        if words[1] == "-m":
            monkeypatch.setattr(sys, "argv", [words[2], *words[3:]])
            runpy.run_module(words[2], run_name="__main__", alter_sys=False)
        else:
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
