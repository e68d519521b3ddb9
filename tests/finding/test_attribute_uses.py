"""How often one path through a method may use an attribute."""

import pytest
from torch import nn

from nmconv.finding.attribute_uses import count_uses


class Methods(nn.Module):
    def plain(self, x):
        return self.act(x)

    def tested(self, x):
        if self.act is not None:
            x = self.act(x)
        return x

    def alternatives(self, x):
        if self.flag:
            return self.act(x)
        return self.act(x + 1)

    def elses(self, x):
        if self.flag:
            x = self.act(x)
        else:
            x = self.act(x + 1)
        return x

    def expr(self, x):
        return self.act(x) if self.flag else self.act(-x)

    def twice(self, x):
        y = self.act(x)
        if self.flag:
            y = self.act(y)
        return y

    def early(self, x):
        x = self.act(x)
        if self.flag:
            return x
        return self.act(x)

    def loop(self, x):
        for m in self.ms:
            if m:
                x = self.act(x)
            else:
                x = m(self.act(x))
        return x

    def store(self, x):
        self.act = x
        return self.act


@pytest.mark.parametrize(
    "method, uses",
    [
        *((name, 1) for name in ("plain", "tested", "alternatives", "elses", "expr", "loop", "store")),
        ("twice", 2),
        ("early", 2),
        ("missing", 0),
    ],
)
def test_uses_on_one_path(method, uses):
    assert count_uses(Methods(), method, "act") == uses


def test_without_source():
    space = {}
    exec("def forward(self, x):\n    return self.act(self.act(x))", space)
    assert count_uses(type("Net", (nn.Module,), space)(), "forward", "act") == 0
    exec("def forward(self, x):\n    x = self.act(x)\n    return self.act(x) if self.deep else x", space)
    assert count_uses(type("Net", (nn.Module,), space)(), "forward", "act") == 2
