"""Every public function has a short example in its docstring, and it runs."""

import doctest
import inspect

import pytest

import nmconv

# Classes that users make or open themselves; the others are only returned, and shown where they are.
CLASSES = ["ActivationRecorder", "Gradual", "Plan", "Sensitivity"]
FUNCTIONS = [name for name in nmconv.__all__ if inspect.isfunction(getattr(nmconv, name))]
PUBLIC = {name: getattr(nmconv, name) for name in [*FUNCTIONS, *CLASSES]} | {"members": nmconv.ensemble.members}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tests = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={})
    examples = [example for test in tests for example in test.examples]
    assert examples, f"nmconv.{name} has no example"
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
