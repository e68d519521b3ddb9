"""Converting, merging and fitting in one thread while others infer, train and trace: no error, and no bit changed."""

import builtins
import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from zoo import models as zoo

import nmconv

torch.manual_seed(0)
NORM, X = nn.BatchNorm2d(3), torch.randn(2, 3, 16, 16)
SMALL = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))


def outputs_without_gradients() -> list[torch.Tensor]:
    """Of batch norms in eval mode; anybody who changes the mode or the gradients of all threads shows."""
    model = copy.deepcopy(SMALL).eval()
    with torch.no_grad():
        found = [model(X), copy.deepcopy(NORM).eval()(X)]
    assert not any(value.requires_grad for value in found)
    return [*found, *model.buffers()]


def weights_after_training() -> list[torch.Tensor]:
    """Of steps under autocast."""
    model = copy.deepcopy(SMALL).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [value.detach() for value in model.state_dict().values()]


def traced() -> list[torch.Tensor]:
    """By fx, which patches ``nn.Module`` for everybody while it does: only what it gives is looked at."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    return [torch.tensor([node.op in ("placeholder", "call_module", "output") for node in graph.graph.nodes])]


def surgery(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = zoo.build(name).eval()
        x = torch.rand(2, 3, 96, 96)
        converted = nmconv.convert(model, "3:1", hoist_padding=True, example_inputs=x)
        nmconv.merge(converted, gate="always", example_inputs=x)
        nmconv.fit(converted, torch.rand(8, 3, 96, 96), reference=model)


@pytest.mark.parametrize(
    "name", [pytest.param("torchvision/googlenet", marks=pytest.mark.slow), "torchvision/resnet50"]
)  # functional; one act shared
@pytest.mark.parametrize("other", [outputs_without_gradients, weights_after_training])
def test_other_threads_go_on(name, other):
    wanted, wrong, done = other(), [], threading.Event()
    rounds = 0

    def go_on():
        nonlocal rounds
        while not done.is_set():
            try:
                found = other()
                wrong.extend(1 for one, two in zip(found, wanted, strict=True) if not torch.equal(one, two))
            except Exception as error:
                wrong.append(repr(error))
                return
            rounds += 1

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        surgery(name)
    finally:
        done.set()
        thread.join()
    assert rounds > 3 and not wrong


def test_another_thread_traces():
    """Fx's patches are for all threads: a module that is called meanwhile is no business of the other trace's."""
    done, wrong = threading.Event(), []

    def go_on():
        while not done.is_set():
            try:
                wrong.extend(1 for value in traced() if not value.all())
            except Exception as error:
                wrong.append(repr(error))

    def forward(self, x):
        return torch.relu(self.b(torch.relu(self.a(x))))

    from nets import net

    model = net(forward, a=nn.Conv2d(3, 3, 3), b=nn.Conv2d(3, 3, 3))
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for _ in range(20):
            assert [site.action for site in nmconv.make_plan(model, keep="boundary").sites] == ["drop", "keep"]
    finally:
        done.set()
        thread.join()
    assert not wrong


def test_two_threads_convert_at_once():
    models = [zoo.build(name).eval() for name in ("torchvision/resnet18", "timm/efficientnet_b0")]
    plans = [nmconv.get_plan(nmconv.convert(model)) for model in models]
    found: list[list[object]] = [[], []]

    def convert(at):
        found[at] += [nmconv.get_plan(nmconv.convert(models[at])) for _ in range(3)]

    threads = [threading.Thread(target=convert, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[plan] * 3 for plan in plans]


SEEN: list[tuple[object, ...]] = []


class Looks(nn.Module):
    """Its forward is recorded, and traced for rewriting, and notes what there is of torch's classes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN.append(patched())
        return torch.relu(self.b(torch.relu(self.a(x))))


class Patched:
    """What there is now. An object, since functions that a traced one calls are copied."""

    def __call__(self) -> tuple[object, ...]:
        spaces = vars(nn.Module), vars(nn.Conv2d), vars(torch.Tensor), vars(torch), globals(), vars(builtins)
        return tuple(dict(space) for space in spaces)


patched = Patched()


def test_nothing_is_patched_meanwhile():
    before, SEEN[:] = patched(), []
    made = nmconv.convert(Looks(), keep="boundary")
    assert [site.action for site in nmconv.get_plan(made).sites] == ["drop", "keep"]
    assert len(SEEN) >= 6  # recordings and traces
    for found in SEEN:
        for space, then in zip(before, found, strict=True):
            assert space.keys() == then.keys()
            assert all(then[name] is value for name, value in space.items())


LOADS = """
import sys, torch
before = set(sys.modules)
import nmconv
new = set(sys.modules) - before
heavy = ("triton", "timm", "matplotlib", "torch.export", "torch.distributed.nn", "torch.utils.benchmark")
heavy += ("torch.utils.cpp", "torch.utils.flop_counter")
print(sorted(name for name in new if name.startswith(heavy)))
"""


def test_importing_loads_no_compilers_and_says_nothing():
    made = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=True)
    assert (made.stdout.strip(), made.stderr) == ("[]", "")
