"""Make a plan from a model's structure and the user's options: pure functions, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from nmconv.planning.plan import Plan
from nmconv.planning.policies import DEFAULT_KEEP, Keep, Unit, check_keep, choose
from nmconv.planning.ratio import Ratio
from nmconv.planning.selection import PatternTarget, Rules, as_patterns
from nmconv.planning.site import Site
from nmconv.planning.structure import Activation, Chain, Item, Structure

__all__ = ["Options", "decide"]


@dataclass(frozen=True)
class Options:
    """What the user asked for; see :func:`nmconv.convert`."""

    ratio: object = "2:1"
    keep: Keep = DEFAULT_KEEP
    relocate: bool = False
    include: str | Iterable[str] = "*"
    exclude: str | Iterable[str] = ()
    linear: bool = False
    hoist: bool = False

    def check(self) -> None:
        """Check the options that do not depend on a model.

        Raises:
            OptionError: If ``keep`` is invalid.
            RatioError: If a ratio is invalid.
        """
        check_keep(self.keep)
        Rules.parse(self.ratio)

    def texts(self) -> tuple[tuple[str, str], ...]:
        """Return the options except the ratio as (name, text) pairs, for the plan."""
        keep = self.keep if isinstance(self.keep, str) else getattr(self.keep, "__name__", "function")
        values = {
            "keep": keep,
            "relocate": self.relocate,
            "include": ", ".join(as_patterns(self.include)),
            "exclude": ", ".join(as_patterns(self.exclude)),
            "linear": self.linear,
            "hoist_padding": self.hoist,
        }
        return tuple((name, str(value)) for name, value in values.items())


def decide(structure: Structure, options: Options, fingerprint: str, locked: Mapping[int, str] = {}) -> Plan:
    """Make a plan: decide for every activation.

    Args:
        structure: The model's structure.
        options: What the user asked for.
        fingerprint: The model's fingerprint.
        locked: From an activation's index to why it cannot be dropped or moved.

    Returns:
        The plan; a unit with locked activations may keep more than its share.

    Raises:
        OptionError: If ``keep`` is a function that returns invalid positions.
        PatternError: If a pattern is malformed or matches nothing.
        RatioError: If a ratio is invalid.
    """
    sites = [_undecided(activation) for activation in structure.activations]
    for index, reason in structure.leading:
        sites[index] = replace(sites[index], role="leading", action="keep", reason=reason)
    for index, reason in locked.items():
        sites[index] = replace(sites[index], locked=reason)
    targets = [_target(item, structure.activations) for chain in structure.chains for item in chain.items]
    rules = Rules(options.ratio, options.include, options.exclude, targets, structure.stages)
    for number, chain in enumerate(structure.chains):
        for index, site in _decide_chain(number, chain, sites, rules, options, structure):
            sites[index] = site if sites[index].chain is None else _one_decision(sites[index], site)
    convs = len({item.convs for chain in structure.chains if chain.modes != "train" for item in chain.items})
    return Plan(
        model=structure.model,
        fingerprint=fingerprint,
        ratio=rules.text,
        options=options.texts(),
        convs=convs,
        sites=tuple(sites),
        untraced=structure.untraced,
    )


def _undecided(activation: Activation) -> Site:
    return Site(
        name=activation.name,
        function=activation.function,
        owner=activation.owner,
        call=activation.call,
        train_call=activation.train_call,
        modes=activation.modes,
        kind=activation.kind,
        action="skip",
        reason=activation.skip or "no convolution next to it",
    )


def _target(item: Item, activations: Sequence[Activation | Site]) -> PatternTarget:
    names = item.convs if item.act is None else (*item.convs, activations[item.act].name)
    return PatternTarget(tuple(name for name in names if name), item.order)


def _one_decision(one: Site, other: Site) -> Site:
    """Return one decision for an activation that is in chains several times: if one call must keep it, all do."""
    if one.action == other.action:
        return one
    kept = one if one.action == "keep" else other
    return replace(kept, action="keep", behind="", reason=f"{kept.reason}; one decision for all calls of it")


def _decide_chain(
    number: int, chain: Chain, sites: Sequence[Site], rules: Rules, options: Options, structure: Structure
) -> Iterator[tuple[int, Site]]:
    """Yield the index and the decided site of each activation of a chain; units do not cross rules."""
    unit = 0
    for rule, segment in groupby(chain.items, key=lambda item: rules.ratio(_target(item, sites))):
        items = list(segment)
        if rule is None:
            for item in items:
                if item.act is not None:
                    yield item.act, _kept(sites[item.act], number, None, item, "left alone by the patterns given")
            continue
        ratio = rule[1]
        for start in range(0, len(items), ratio.n):
            members = items[start : start + ratio.n]
            yield from _decide_unit(number, unit, chain.pre, members, ratio, sites, options, structure)
            unit += 1


def _decide_unit(
    chain: int,
    unit: int,
    pre: bool,
    members: Sequence[Item],
    ratio: Ratio,
    sites: Sequence[Site],
    options: Options,
    structure: Structure,
) -> Iterator[tuple[int, Site]]:
    owned = [(position, item, item.act) for position, item in enumerate(members) if item.act is not None]
    size, allowed = len(members), ratio.kept(len(members))
    if len(owned) <= allowed:
        kept = frozenset(range(len(owned)))
        share = f"unit of {size} has few enough"
    else:
        choice = Unit(
            chain=chain,
            unit=unit,
            pre=pre,
            convs=tuple(item.convs for item in members),
            sites=tuple(sites[index].id for _, _, index in owned),
            owners=tuple(position for position, _, _ in owned),
            allowed=allowed,
        )
        kept = choose(options.keep, choice)
        share = f"unit of {size} keeps {allowed} of {len(owned)}"
    moved = max(kept, default=None) if options.relocate else None
    for position, (_, item, index) in enumerate(owned):
        site = _kept(sites[index], chain, unit, item, share)
        if position not in kept and site.locked:
            site = replace(site, reason=f"{share}, but this one cannot be dropped: {site.locked}")
        elif position not in kept:
            site = replace(site, action="drop")
        elif position == moved:
            site = _relocated(site, members[-1], pre, share, structure.activations[index].movable)
        yield index, site


def _kept(site: Site, chain: int, unit: int | None, item: Item, reason: str) -> Site:
    return replace(
        site, action="keep", reason=reason, chain=chain, unit=unit, role=item.role, convs=item.convs, behind=""
    )


def _relocated(site: Site, last: Item, pre: bool, share: str, movable: bool) -> Site:
    """Move a unit's last kept activation to the unit's end if its last convolution owns no activation."""
    if pre or last.act is not None:
        return site
    if site.locked or last.end is None or not movable:
        why = site.locked or last.end_reason or "it has parameters, whose names would change"
        return replace(site, reason=f"{share}; it stays in its place: {why}")
    return replace(site, action="move", behind=last.convs[0], reason=f"{share}, at the unit's end")
