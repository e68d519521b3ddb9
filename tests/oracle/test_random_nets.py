"""Random nets against the oracle: hypothesis draws real Python source of modules, and every conversion must hold.

For every net: the plan names exactly the activation calls that the oracle's recorder sees, and whatever is dropped (a
ratio, all, a random part), the converted model does what the original does with those calls skipped at run time: the
same outputs, buffers and changes to the input, to the bit, in eval and in train mode, and the same gradients.
"""

import copy
import itertools
import os
import pickle
import sys
import types
import warnings

import pytest
import torch
from calls import calls_of
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import nmconv
from oracle import assert_same, dropped, record

torch.set_num_threads(1)

MODULE_ACTS = (
    "nn.ReLU()", "nn.ReLU(inplace=True)", "nn.SiLU()", "nn.SiLU(inplace=True)", "nn.GELU()", "nn.PReLU()",
    "nn.LeakyReLU(0.2)", "nn.LeakyReLU(0.2, inplace=True)", "nn.Hardswish()", "nn.ELU(inplace=True)", "nn.Softplus()",
    "nn.ReLU6(inplace=True)",
)  # fmt: skip
OUT_ACTS = (
    "F.relu({0})", "torch.relu({0})", "{0}.relu()", "F.silu({0})", "F.gelu({0})", "F.leaky_relu({0}, 0.2)",
    "F.relu(input={0})", "F.elu({0}, alpha=0.5)", "F.relu({0}, inplace=False)",
)  # fmt: skip
IN_ACTS = (
    "F.relu({0}, inplace=True)", "F.relu({0}, True)", "{0}.relu_()", "F.relu_({0})", "torch.relu_({0})",
    "F.silu({0}, inplace=True)", "F.leaky_relu({0}, 0.2, True)", "F.elu_({0})", "F.relu(input={0}, inplace=True)",
)  # fmt: skip
ALIASES = (
    "{0}", "{0}.view({0}.shape)", "{0}.flatten(2).view({0}.size(0), {0}.size(1), {0}.size(2), {0}.size(3))",
    "{0}.permute(0, 1, 3, 2)", "{0}[:]", "{0}.contiguous()", "{0}.float()", "{0}.view_as({0})",
    "{0}.unsqueeze(0).squeeze(0)", "{0}.transpose(2, 3)", "{0}.reshape({0}.shape)", "{0}.flip(2)", "{0}.clone()",
    "torch.flatten({0}, 2).unflatten(2, {0}.shape[2:])", "{0}.expand_as({0})", "torch.permute({0}, (0, 1, 3, 2))",
)  # fmt: skip
SPLITS = (
    "{0}.chunk(2, 1)", "torch.chunk({0}, 2, 1)", "{0}.split(2, 1)", "torch.split({0}, 2, 1)",
    "{0}[:, :2], {0}[:, 2:]", "{0}.narrow(1, 0, 2), torch.narrow({0}, 1, 2, 2)", "{0}[:, ::2], {0}[:, 1::2]",
    "torch.tensor_split({0}, 2, 1)",
)  # fmt: skip
# No difference of a value and itself: the oracle tells activations by their values, and zeros fit all.
NEW_BINARY = ("{0} + {1}", "torch.add({0}, {1})", "{0} - 0.7 * {1}", "{0}.add({1})", "{0} * {1}", "torch.mul({0}, {1})")
IN_BINARY = ("{0} += {1}", "{0}.add_({1})", "{0} *= {1}", "{0} -= 0.7 * {1}", "{0} = {0}.mul_({1})", "{0}[:] = {1}")
NEW_SCALE = ("{0} * 0.5", "{0} + 0.1", "0.5 * {0}", "{0} / 2", "1 - {0}", "{0} * self.gamma", "{0} + self.gamma")
IN_SCALE = ("{0} *= 0.5", "{0} += 0.1", "{0}.mul_(0.5)", "{0} /= 2", "{0} *= self.gamma", "{0}.clamp_(-1, 1)")
GATES = (
    "{0} * torch.sigmoid({1})", "{1}.sigmoid() * {0}", "{0} * F.adaptive_avg_pool2d({1}, 1)",
    "{0} * {1}.mean((2, 3), keepdim=True).sigmoid()", "{0} + {1}.mean((2, 3), keepdim=True)",
    "{0} * F.hardsigmoid({1})", "{0} * F.relu({1})", "{0} * torch.tanh({1})",
)  # fmt: skip
DROPS = (
    "F.dropout({0}, 0.3, self.training)", "F.dropout({0}, 0.3, self.training, True)",
    "F.dropout({0}, p=0.3, training=self.training, inplace=True)", "F.dropout2d({0}, 0.3, self.training)",
)  # fmt: skip
DROP_MODULES = ("nn.Dropout(0.3)", "nn.Dropout2d(0.3)", "nn.Dropout(0.3, inplace=True)", "nn.Identity()")
POOLS = ("F.avg_pool2d({0}, 3, 1, 1)", "F.max_pool2d({0}, 3, 1, 1)", "F.pad(F.avg_pool2d({0}, 3, 1), (1, 1, 1, 1))")

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(4, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


def helped(x):
    return F.relu(x)
"""


class Writer:
    """Writes one module class: statements over tensors of 2, 4 or 8 channels, the extents all alike."""

    def __init__(self, draw, name, depth, outer=()):
        self.draw, self.name, self.depth = draw, name, depth
        self.init = ["self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 4)[:, None, None])"]
        self.lines: list[str] = []
        self.indent = "        "
        self.width: dict[str, int] = {"x": 4}
        self.made: dict[str, list[str]] = {}
        self.count = itertools.count()
        self.methods: list[str] = []
        self.classes: list[str] = []
        self.outer = list(outer)

    def pick(self, options):
        return self.draw(st.sampled_from(tuple(options)))

    def chance(self, percent):
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def var(self, *widths):
        """A tensor at hand, the latest ones more often."""
        names = [name for name, width in self.width.items() if not widths or width in widths]
        at = min(self.draw(st.integers(0, len(names) - 1)), self.draw(st.integers(0, len(names) - 1)))
        return names[::-1][at]

    def new(self, width=4, same=None):
        name = same if same is not None and self.chance(50) else f"v{next(self.count)}"
        self.width.pop(name, None)
        self.width[name] = width
        return name

    def say(self, line):
        self.lines.append(self.indent + line)

    def child(self, constructor, prefix="m"):
        """Name of a child made like this: mostly a new one, sometimes one that is there already."""
        there = self.made.setdefault(constructor, [])
        if there and self.chance(25):
            return self.pick(there)
        name = f"{prefix}{next(self.count)}"
        self.init.append(f"self.{name} = {constructor}")
        there.append(name)
        return name

    # -- statements ---------------------------------------------------------------------------------------------------

    def conv(self):
        source = self.var()
        kernel = self.pick(("3, padding=1", "1", "3, padding=1, groups=2", "3, padding=1, bias=False"))
        name = self.child(f"nn.Conv2d({self.width[source]}, 4, {kernel})", "conv")
        made = self.new(4, source)
        self.say(f"{made} = self.{name}({source})")
        if self.chance(50):
            self.say(f"{made} = self.{self.child('nn.BatchNorm2d(4)', 'bn')}({made})")
        if self.chance(70):
            self.act(made)

    def act(self, source=None):
        source = source or self.var()
        width = self.width[source]
        form = self.pick(("module", "out", "in", "statement", "outer", "helper"))
        if form == "outer" and self.outer:
            text = f"self.{self.pick(self.outer)}({source})"
        elif form == "helper":
            text = f"helped({source})"
        elif form in ("module", "outer"):
            call = self.pick(("{0}", "{0}", "input={0}"))
            text = f"self.{self.child(self.pick(MODULE_ACTS), 'act')}({call.format(source)})"
        else:
            text = self.pick(OUT_ACTS if form == "out" else IN_ACTS).format(source)
            if form == "statement":
                self.say(text)
                return
        self.say(f"{self.new(width, source)} = {text}")

    def norm(self):
        source = self.var()
        width = self.width[source]
        kind = self.pick((f"nn.BatchNorm2d({width})", f"nn.GroupNorm(1, {width})"))
        self.say(f"{self.new(width, source)} = self.{self.child(kind, 'bn')}({source})")

    def alias(self):
        source = self.var()
        self.say(f"{self.new(self.width[source])} = {self.pick(ALIASES).format(source)}")

    def binary(self):
        one = self.var()
        other = self.var(self.width[one])
        if self.chance(50):
            self.say(f"{self.new(self.width[one], one)} = {self.pick(NEW_BINARY).format(one, other)}")
        else:
            self.say(self.pick(IN_BINARY).format(one, other))

    def scale(self):
        source = self.var(4)
        if self.chance(50):
            self.say(f"{self.new(4, source)} = {self.pick(NEW_SCALE).format(source)}")
        else:
            self.say(self.pick(IN_SCALE).format(source))

    def gate(self):
        one = self.var(4)
        if self.chance(40):
            self.say(f"{self.new(4, one)} = self.{self.child('Gate()', 'se')}({one})")
            return
        text = self.pick(GATES).format(one, self.var(4))
        self.say(f"{self.new(4, one)} = {text}")

    def cat(self):
        one, other = self.var(4), self.var(4)
        self.say(f"{self.new(8)} = torch.cat([{one}, {other}], 1)")

    def split(self):
        source = self.var(4)
        one, other = self.new(2), self.new(2)
        self.say(f"{one}, {other} = {self.pick(SPLITS).format(source)}")

    def rejoin(self):
        one, other = (self.var(2), self.var(2)) if 2 in self.width.values() else (None, None)
        if one is None:
            self.split()
        else:
            self.say(f"{self.new(4)} = torch.cat(({one}, {other}), dim=1)")

    def drop(self):
        source = self.var()
        text = self.pick(DROPS).format(source)
        if self.chance(50):
            text = f"self.{self.child(self.pick(DROP_MODULES), 'drop')}({source})"
        self.say(f"{self.new(self.width[source], source)} = {text}")

    def pool(self):
        source = self.var()
        self.say(f"{self.new(self.width[source], source)} = {self.pick(POOLS).format(source)}")

    def number(self):
        source = self.var()
        name = f"n{next(self.count)}"
        self.say(f"{name} = {source}.size(1)")
        self.say(f"{name}b = {name}")
        self.say(f"{name} += 1")
        self.say(f"{self.new(self.width[source], source)} = {source} * {name} / {name}b")

    def sequential(self):
        source, parts = self.var(), []
        width = self.width[source]
        for _ in range(self.draw(st.integers(1, 3))):
            parts += [f"nn.Conv2d({width}, 4, 3, padding=1)"]
            width = 4
            parts += ["nn.BatchNorm2d(4)"] if self.chance(40) else []
            parts += [self.pick(MODULE_ACTS)] if self.chance(80) else []
        name = self.child(f"nn.Sequential({', '.join(parts)})", "seq")
        self.say(f"{self.new(4, source)} = self.{name}({source})")

    def residual(self):
        """The usual thing, so that there is something to drop."""
        source = self.var(4)
        made = self.new(4)
        self.say(f"{made} = {source}")
        for step in range(self.draw(st.integers(2, 3))):
            self.say(f"{made} = self.{self.child('nn.Conv2d(4, 4, 3, padding=1)', 'conv')}({made})")
            if step == 0 or self.chance(50):
                self.act_into(made)
        self.say(self.pick(("{0} += {1}", "{0} = {0} + {1}", "{0} = {1} + {0}")).format(made, source))
        if self.chance(60):
            self.act_into(made)

    def act_into(self, name):
        form = self.pick((*MODULE_ACTS, *OUT_ACTS, *IN_ACTS))
        text = f"self.{self.child(form, 'act')}({name})" if form.startswith("nn.") else form.format(name)
        self.say(f"{name} = {text}")

    def mode(self):
        condition = self.pick(("self.training", "not self.training", "self.training and True"))
        self.say(f"if {condition}:")
        self.inside(self.pick((self.conv, self.act, self.scale, self.drop, self.binary)))

    def inside(self, statement):
        """A statement whose new names are not known after it."""
        known, outer, lines = dict(self.width), self.indent, len(self.lines)
        self.indent += "    "
        statement()
        if len(self.lines) == lines:
            self.say("pass")
        self.indent = outer
        self.width = {name: self.width.get(name, width) for name, width in known.items()}

    def method(self):
        """A helper method of one tensor that holds some of the statements."""
        source, name = self.var(4), f"_part{next(self.count)}"
        lines, width, indent, self.lines, self.width, self.indent = (
            self.lines,
            self.width,
            self.indent,
            [],
            {"x": 4},
            "        ",
        )
        for _ in range(self.draw(st.integers(1, 3))):
            self.statement(self.PLAIN)
        self.methods.append("\n".join([f"    def {name}(self, x):", *self.lines, f"        return {self.var(4)}"]))
        self.lines, self.width, self.indent = lines, width, indent
        for _ in range(2 if self.chance(20) else 1):
            made = self.new(4)
            self.say(f"{made} = self.{name}({source})")
            source = made

    def loop(self):
        source = self.var(4)
        made = self.new(4)
        self.say(f"{made} = {source}")
        convs = ", ".join(["nn.Conv2d(4, 4, 3, padding=1)"] * self.draw(st.integers(1, 3)))
        name = self.child(f"nn.ModuleList([{convs}])", "list")
        self.say(f"for layer in self.{name}:")
        self.say(f"    {made} = layer({made})")
        self.indent += "    "
        self.act_into(made)
        self.indent = self.indent[:-4]

    def block(self):
        """A child of a class written here, with one input or two, called once or more."""
        source, two, again = self.var(4), self.chance(40), self.chance(25)
        shared = self.chance(30)
        inner = Writer(self.draw, f"{self.name}B{next(self.count)}", self.depth + 1, ("outer",) if shared else ())
        if two:
            inner.width["skip"] = 4
        inner.body(self.draw(st.integers(1, 6)))
        if shared:
            inner.init.append("self.outer = outer")
        inner.close(f"return {inner.var(4)}", ", skip" if two else "", ", outer" if shared else "")
        self.classes += inner.classes
        argument = f"self.{self.child(self.pick(MODULE_ACTS), 'act')}" if shared else ""
        child = self.child(f"{inner.name}({argument})", "block")
        for _ in range(2 if again else 1):
            skip = self.pick((f", {self.var(4)}", f", skip={self.var(4)}")) if two else ""
            made = self.new(4)
            self.say(f"{made} = self.{child}({source}{skip})")
            source = made

    PLAIN = (conv, conv, conv, act, act, norm, alias, binary, binary, scale, gate, cat, split, rejoin, drop, pool)
    ALL = (*PLAIN, sequential, residual, residual, number, mode, method, loop, block, block)

    def statement(self, kinds=None):
        kinds = kinds or (self.ALL if self.depth < 2 else self.ALL[:-2])
        kinds[self.draw(st.integers(0, len(kinds) - 1))](self)

    def body(self, statements):
        for _ in range(statements):
            self.statement()

    def close(self, end, parameters="", arguments=""):
        init = "\n".join("        " + line for line in self.init)
        lines = "\n".join([*self.lines, "        " + end])
        methods = "".join(method + "\n\n" for method in self.methods)
        self.classes.append(
            f"class {self.name}(nn.Module):\n    def __init__(self{arguments}):\n        super().__init__()\n{init}\n\n"
            f"{methods}    def forward(self, x{parameters}):\n{lines}\n"
        )


@st.composite
def sources(draw):
    """The source of a net of one input, its class named Net."""
    net = Writer(draw, "Net", 0)
    net.body(draw(st.integers(2, 12)))
    one, other = net.var(4), net.var(4)
    end = net.pick(
        ("return {0}", "return {0}", "return {0}, {1}", "return dict(a={0}, b=[{1}])", "return {0}.mean((2, 3))")
    )
    end = end.format(one, other)
    if net.chance(20):
        net.init.append("self.aux = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())")
        end = f"return ({end.removeprefix('return ')}, self.aux({other}) if self.training else None)"
    net.close(end)
    return Source("\n\n".join([HEAD, *net.classes]))


class Source(str):
    """Text that is shown as it is when an example fails."""

    def __repr__(self):
        return f'Source("""{self.removeprefix(HEAD)}""")'


NAME = "nmconv_random_net"
# The reasons for which these nets may hold a call that cannot be dropped.
REFUSED = ("one decision would change several", "it is called with arguments that differ from call to call")


def build(source):
    """The net, of a module that can be imported (pickle asks for it)."""
    space = types.ModuleType(NAME)
    sys.modules[NAME] = space
    exec(compile(source, NAME, "exec"), space.__dict__)
    torch.manual_seed(0)
    return space.Net()


def picture():
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3))


def run(model, training):
    """Output, buffers and input after one seeded forward; the model's buffers are put back."""
    state = copy.deepcopy(dict(model.named_buffers()))
    model.train(training)
    torch.manual_seed(1)
    x = picture()
    with torch.no_grad():
        output = model(x)
        after = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    return output, after, x


def gradients(model):
    """The gradients of all parameters in train mode, or None where autograd refuses."""
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    state = copy.deepcopy(dict(model.named_buffers()))
    try:
        output = model(picture())
        total = sum(part.square().mean() for part in tensors(output))
        total.backward()
    except RuntimeError as error:
        return None, error
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(state[name])
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, None


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [tensor for part in value if part is not None for tensor in tensors(part)] if value is not None else []


def vars_of(model):
    return [
        {name: value for name, value in vars(module).items() if not name.startswith("_")} for module in model.modules()
    ]


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        return function(*args, **kwargs)


def same_calls(model, plan):
    """The plan names the calls that are really made, each once, in each mode."""
    calls = calls_of(model, plan)
    for training in (False, True):
        with record(model) as entries:
            run(model, training)
        real = {
            (entry.owner, entry.name or entry.owner, entry.call, entry.inplace, functional(entry)) for entry in entries
        }
        names = first_names(model)
        planned = [
            (
                site.owner,
                names[site.name],
                site.train_call if training and site.modes == "both" else site.call,
                calls[site.id].inplace,
                site.function,
            )
            for site in plan.sites
            if site.modes in ("both", "train" if training else "eval") and "never calls it" not in site.reason
        ]
        assert len(set(planned)) == len(planned)
        assert set(planned) == real, f"{'train' if training else 'eval'} mode"


def functional(entry):
    return None if entry.name else entry.kind


def first_names(model):
    firsts = {module: name for name, module in model.named_modules()}
    return {name: firsts[module] for name, module in model.named_modules(remove_duplicate=False)}


def holds(model, plan, inplace=False):
    """The converted model does what the original does when the plan's calls are skipped."""
    gone = [site for site in plan.sites if site.action == "drop"]
    expected = []
    for training in (False, True):
        with dropped(model, gone) as log:
            expected.append(run(model, training))
        log.assert_all_hit(training=training)
    log.assert_inplace_agrees()
    with dropped(model, gone):
        slopes, _ = gradients(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = copy.deepcopy(model) if inplace else model
    converted = quiet(nmconv.apply_plan, source, plan, inplace=inplace, example_inputs=picture())
    assert (converted is source) == inplace
    assert isinstance(converted, type(model))
    assert list(converted.state_dict()) == list(before)
    for kind, other in (("converted", converted), ("pickled", pickle.loads(pickle.dumps(converted)))):
        for training, wanted in zip((False, True), expected, strict=True):
            assert_same(run(other, training), wanted, f"{kind}, training={training}")
    if slopes is not None:
        found, error = gradients(converted)
        assert error is None, f"autograd refuses the converted model only: {error}"
        assert list(found) == list(slopes)
        for name in found:
            torch.testing.assert_close(found[name], slopes[name], rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)
    assert_same(dict(model.state_dict()), before, "the original")


def check(source, ratio, keep, chosen, inplace):
    model = build(source)
    untouched = [run(model, training) for training in (False, True)]
    found = copy.deepcopy([dict(model.named_buffers()), *vars_of(model)])
    try:
        plan = nmconv.make_plan(model, ratio, keep=keep, example_inputs=picture())
    except nmconv.NoSitesError:
        event("no sites")
        return
    assert_same([dict(model.named_buffers()), *vars_of(model)], found, "the model that was planned")
    assert not plan.untraced
    if any(site.function == "expression" for site in plan.sites):
        event("an expression in one value that equals no named activation: the oracle does not know it")
        return
    assert all(any(reason in site.locked for reason in REFUSED) for site in plan.sites if site.locked)
    same_calls(model, plan)
    holds(model, plan, inplace)
    even = nmconv.make_plan(model, "1:1", example_inputs=picture())
    assert not even.changes
    idle = quiet(nmconv.apply_plan, model, even, example_inputs=picture())
    assert_same([run(idle, training) for training in (False, True)], untouched, "1:1")
    sites = [site for site in plan.sites if site.action != "skip" and not site.locked]
    event(f"droppable sites: {min(len(sites), 6)}")
    calls = calls_of(model, plan, picture())
    event(f"copies: {sum(calls[site.id].copy for site in sites) > 0}")
    for gone in ([True] * len(sites), chosen):
        edits = {site.id: "drop" if drop else "keep" for site, drop in zip(sites, gone, strict=False)}
        edited = plan.edit(edits)
        try:
            quiet(nmconv.apply_plan, model, edited, example_inputs=picture())
        except nmconv.RewriteError as error:
            event("an edit that cannot be written")
            assert any(reason in str(error) for reason in REFUSED), error
            swaps = {site.id: "keep" for site in sites if calls[site.id].how == "rewrite"}
            edited = edited.edit(swaps)
        holds(model, edited, inplace)


examples = given(
    source=sources(),
    ratio=st.sampled_from(("2:1", "3:1", "3:2", "4:1", "100:1")),
    keep=st.sampled_from(("boundary", "first", "spread")),
    chosen=st.lists(st.booleans(), min_size=40, max_size=40),
    inplace=st.booleans(),
)
common = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=20, derandomize=True, **common)
@examples
def test_random_nets(source, ratio, keep, chosen, inplace):
    check(source, ratio, keep, chosen, inplace)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("NMCONV_EXAMPLES", "2000")), print_blob=True, **common)
@examples
def test_many_random_nets(source, ratio, keep, chosen, inplace):
    check(source, ratio, keep, chosen, inplace)
