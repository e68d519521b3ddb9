"""Damaged and hostile files: mutants of a small net's file, and the check that judges what load makes of them.

``PYTHONPATH=.:tests/support python tests/io/mutants.py 10000`` checks that many in a process with little memory, and
prints how many were refused.
"""

from __future__ import annotations

import json
import math
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from io_nets import Net, classes, copied, drawn, file_of, held, parts_of, said, saying, snapshot, state, tensors_of

import nmconv

SPARE = 2**30  # bytes of address space beyond what the process has when it starts
SLOWEST = 20  # seconds for one file, on a busy machine

Data = bytes
Mutate = Callable[[random.Random, Data], Data]


def originals() -> list[bytes]:
    """The files of a small net: converted and merged twice, live, and neither."""
    net = drawn(Net())
    converted = nmconv.convert(net, "2:1", relocate=True, keep="boundary")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        found = []
        for model in (
            nmconv.merge(nmconv.fold_norms(converted), gate="always"),
            nmconv.merge(converted, live=True),
            net,
        ):
            nmconv.save(model, path)
            found.append(path.read_bytes())
    return found


# Ways to mutate ------------------------------------------------------------------------------------------------------


def flipped(chance: random.Random, data: Data) -> Data:
    """Some bits flipped, half of the time in the header."""
    made = bytearray(data)
    end = len(made) if chance.random() < 0.5 else 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        made[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return bytes(made)


def cut(chance: random.Random, data: Data) -> Data:
    at = chance.choice((chance.randrange(len(data)), chance.randrange(9), len(data) - chance.randrange(1, 9)))
    return data[:at]


def inserted(chance: random.Random, data: Data) -> Data:
    """Bytes put in, taken out, or doubled."""
    at, count = chance.randrange(len(data)), chance.choice((1, 1, 4, 64))
    how = chance.randrange(3)
    added = chance.randbytes(count) if how == 0 else data[at : at + count] if how == 1 else b""
    return data[:at] + added + data[at + (count if how == 2 else 0) :]


def redeclared(chance: random.Random, data: Data) -> Data:
    """A valid header that declares something else."""
    header, body = parts_of(data)
    names = [name for name in header if name != "__metadata__"]
    name = chance.choice(names)
    how = chance.randrange(8)
    entry = header[name]
    if how == 0:
        entry["shape"] = list(chance.choice((entry["shape"][::-1], [*entry["shape"], 1], [math.prod(entry["shape"])])))
    elif how == 1:
        entry["dtype"] = chance.choice(("F64", "F32", "I32", "I64", "BOOL", "F8_E4M3", "F4", "U16", "C64", "X"))
    elif how == 2:
        header[chance.choice(("other", name + ".x", "", "__metadata", "rep"))] = header.pop(name)
    elif how == 3:
        other = chance.choice(names)
        header[name], header[other] = header[other], header[name]
    elif how == 4:
        entry["data_offsets"] = [chance.choice((0, -1, 2**63, entry["data_offsets"][0])), chance.choice((0, 2**64, 9))]
    elif how == 5:
        entry["shape"] = [chance.choice((2**20, 2**31, 2**62, -1)) for _ in range(chance.randrange(1, 5))]
    elif how == 6:
        del header[name]
    else:
        size = struct.pack("<Q", chance.choice((0, 1, 2**26, 2**40, 2**63, len(data))))
        return size + data[8:]
    return file_of(header, body)


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, 2**63, 10**400, 0.5, 1e308, math.nan, math.inf),
    *("", "T", "forward", "stem", "rep", "norm", "head", "__class__", "restore", "train", "../x", "\0", "x" * 10_000),
    *(
        [],
        [[]],
        {},
        {"format": 3},
        [0],
        [-1, -1],
        ["T"],
        '[["T"], {}]',
        '[["T", ["str", "x"]], {}]',
        '[[], {"a b": 1}]',
    ),
)


def resaid(chance: random.Random, data: Data) -> Data:
    """Valid JSON that says something else in one place, or in two."""
    content = said(data)
    for _ in range(chance.choice((1, 1, 1, 2))):
        spots = list(_spots(content))
        # long lists of sites would get nearly all of it otherwise
        kinds = sorted({_kind(path) for path, _, _ in spots})
        kind = chance.choice(kinds)
        _, parent, key = chance.choice([spot for spot in spots if _kind(spot[0]) == kind])
        value = parent[key]
        how = chance.randrange(12)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, list):
            parent.insert(key, value)
        elif how < 5:  # what stands elsewhere
            others = [other[at] for _, other, at in spots if type(other[at]) is type(value) or how == 2]
            parent[key] = json.loads(json.dumps(chance.choice(others)))
        elif how < 9:
            parent[key] = near(chance, value)
        else:
            alike = [hostile for hostile in HOSTILE if type(hostile) is type(value) or how == 9]
            parent[key] = chance.choice(alike or HOSTILE)
    return saying(data, content)


def near(chance: random.Random, value: Any) -> Any:
    """Something that is nearly right."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return chance.choice((value + 1, value - 1, value * 2, -value, float(value)))
    if isinstance(value, str):
        return chance.choice((value + "x", value[1:], value[::-1], value.upper(), value + ".0"))
    if isinstance(value, list):
        return chance.choice((value[::-1], value[1:], value * 2, [value]))
    return {**value, "more": 1}


def _spots(value: Any, path: tuple[Any, ...] = ()) -> Any:
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key), value, key
        if isinstance(part, (dict, list)):
            yield from _spots(part, (*path, key))


def _kind(path: tuple[Any, ...]) -> str:
    return ".".join(part if isinstance(part, str) else "*" for part in path)


def retold(chance: random.Random, data: Data) -> Data:
    """Metadata that is no JSON, or too much of it."""
    text = parts_of(data)[0]["__metadata__"]["nmconv"]
    at = chance.randrange(len(text))
    deep = chance.choice(("[" * 100_000, '{"a":' * 100_000, text[:at], text[:at] + "x" + text[at:], "null", "{}", ""))
    return saying(data, deep)


WAYS: tuple[tuple[int, Mutate], ...] = (
    (15, flipped), (8, cut), (8, inserted), (15, redeclared), (50, resaid), (4, retold),
)  # fmt: skip


# The judge -----------------------------------------------------------------------------------------------------------


class Judge:
    """Loads mutants and checks what becomes of them and of the pristine net."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "mutant.safetensors"
        self.trap = folder / "trap"
        self.originals = originals()
        self.pristine = drawn(Net(), 1)
        self.before = snapshot(self.pristine)
        self.references = []
        for data in self.originals:
            self.path.write_bytes(data)
            self.references.append(nmconv.load(self.pristine, self.path))

    def check(self, chance: random.Random) -> str:
        """Make one mutant and load it: ``same``, ``refused`` or ``loaded``."""
        which = chance.choice((0, 0, 0, 1, 2))
        original = self.originals[which]
        (way,) = chance.choices([way for _, way in WAYS], [weight for weight, _ in WAYS])
        data = way(chance, original)
        if data == original:
            return "same"
        self.path.write_bytes(data)
        inplace = chance.random() < 0.5
        model = copied(self.pristine) if inplace else self.pristine
        before = snapshot(model)
        started = time.monotonic()
        try:
            loaded = nmconv.load(model, self.path, inplace=inplace)
        except (nmconv.FileError, nmconv.WitnessError) as error:
            assert str(self.path) in str(error)
            assert len(str(error)) < 2000
            assert snapshot(model) == before
            return "refused"
        finally:
            assert time.monotonic() - started < SLOWEST
            assert not self.trap.exists()
        self._check_loaded(loaded, data, which)
        if inplace:
            assert loaded is model
        else:
            assert snapshot(model) == before
        return "loaded"

    def _check_loaded(self, loaded: Any, data: bytes, which: int) -> None:
        """It is what the file says: in its records and its state, and so is its structure."""
        content = said(data)
        assert agrees(nmconv.get_merges(loaded), content["merges"])
        plan = content["plan"]  # which may write out what to_json leaves to the defaults
        assert nmconv.get_plan(loaded) == (plan and nmconv.Plan.from_json(json.dumps(plan)))
        wanted = held(data)
        found = state(loaded)
        assert found.keys() == wanted.keys()
        for name, (dtype, shape, content_bits) in found.items():
            assert shape == wanted[name][1]
            if dtype == wanted[name][0]:
                assert content_bits == wanted[name][2]
        assert not any(value.is_meta for value in tensors_of(loaded))
        if (content["plan"], content["merges"]) == tuple(
            said(self.originals[which])[key] for key in ("plan", "merges")
        ):
            assert classes(loaded) == classes(self.references[which])


def agrees(found: Any, written: Any) -> bool:
    """Whether what was loaded is what is written; what is left out must be the default."""
    if is_dataclass(found):
        own = {field.name: field.default for field in fields(found)}
        values = [(getattr(found, name), name, default) for name, default in own.items()]
        return written.keys() <= own.keys() and all(
            agrees(value, written[name]) if name in written else value == default for value, name, default in values
        )
    if isinstance(found, tuple):
        return len(found) == len(written) and all(map(agrees, found, written))
    return type(found) is type(written) and found == written


def check(count: int, seed: int) -> Counter[str]:
    """Check so many mutants; says which one fails."""
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(Path(folder))
        found: Counter[str] = Counter()
        for at in range(count):
            try:
                found[judge.check(random.Random(f"{seed} {at}"))] += 1
            except BaseException as error:
                raise AssertionError(f"mutant {seed} {at}: {type(error).__name__}: {str(error)[:2000]}") from error
        assert snapshot(judge.pristine) == judge.before
    return found


def main(count: int, seed: int) -> None:
    """Check in little memory: what a file declares must not be allocated because it says so."""
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", nmconv.RemovedParametersWarning)  # a live net that is loaded in place
    check(20, seed)  # whatever is imported and cached late
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**check(count, seed), "grown_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
