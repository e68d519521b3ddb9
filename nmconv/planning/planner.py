"""From what a model is made of to what becomes of each activation: pure functions, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from nmconv.planning.plan import Plan, Site
from nmconv.planning.policies import BOUNDARY, Keep, Unit, check_keep, choose
from nmconv.planning.ratio import Ratio
from nmconv.planning.selection import PatternTarget, Rules, listed
from nmconv.planning.structure import Activation, Chain, Item, Structure

__all__ = ["Options", "draw_up"]

_SKIP_NOTHING: Mapping[int, str] = {}


@dataclass(frozen=True)
class Options:
    """What the user asked for; see :func:`nmconv.convert`."""

    ratio: object = "2:1"
    keep: Keep = BOUNDARY
    relocate: bool = False
    include: str | Iterable[str] = "*"
    exclude: str | Iterable[str] = ()
    linear: bool = False
    hoist: bool = False

    def check(self) -> None:
        """Refuse what no model could be planned with.

        Raises:
            OptionError, RatioError, PatternError: For an option that is none.
        """
        check_keep(self.keep)
        Rules.parse(self.ratio)

    def texts(self) -> tuple[tuple[str, str], ...]:
        """The options apart from the ratio, as text for the plan."""
        keep = self.keep if isinstance(self.keep, str) else getattr(self.keep, "__name__", "function")
        values = {
            "keep": keep,
            "relocate": self.relocate,
            "include": _text(self.include),
            "exclude": _text(self.exclude),
            "linear": self.linear,
            "hoist_padding": self.hoist,
        }
        return tuple((name, str(value)) for name, value in values.items())


def draw_up(
    structure: Structure, options: Options, fingerprint: str, locked: Mapping[int, str] = _SKIP_NOTHING
) -> Plan:
    """Decide for every activation.

    Args:
        structure: What the analysis found.
        options: What was asked for.
        fingerprint: The model's.
        locked: From an activation's index to why it cannot be dropped or moved.

    Returns:
        The plan; a unit that has locked activations may keep more than its share.
    """
    sites = [_bare(activation) for activation in structure.activations]
    for index, reason in structure.leading:
        sites[index] = replace(sites[index], role="leading", action="keep", reason=reason)
    for index, reason in locked.items():
        sites[index] = replace(sites[index], locked=reason)
    rules = Rules(options.ratio, options.include, options.exclude, _spots(structure), structure.stages)
    for number, chain in enumerate(structure.chains):
        for index, site in _decide(number, chain, sites, rules, options, structure):
            sites[index] = site if sites[index].chain is None else _for_all(sites[index], site)
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


def _text(patterns: str | Iterable[str]) -> str:
    return ", ".join(listed(patterns))


def _bare(activation: Activation) -> Site:
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


def _spot(item: Item, activations: Sequence[Activation | Site]) -> PatternTarget:
    names = item.convs if item.act is None else (*item.convs, activations[item.act].name)
    return PatternTarget(tuple(name for name in names if name), item.order)


def _spots(structure: Structure) -> list[PatternTarget]:
    return [_spot(item, structure.activations) for chain in structure.chains for item in chain.items]


def _for_all(one: Site, other: Site) -> Site:
    """One decision for an activation that stands in a chain several times: what one call must keep, all keep."""
    if one.action == other.action:
        return one
    kept = one if one.action == "keep" else other
    return replace(kept, action="keep", behind="", reason=f"{kept.reason}; one decision for all calls of it")


def _decide(
    number: int, chain: Chain, sites: Sequence[Site], rules: Rules, options: Options, structure: Structure
) -> Iterator[tuple[int, Site]]:
    unit = 0
    for found, segment in groupby(chain.items, key=lambda item: rules.ratio(_spot(item, sites))):
        items = list(segment)
        if found is None:
            for item in items:
                if item.act is not None:
                    yield item.act, _kept(sites[item.act], number, None, item, "left alone by the patterns given")
            continue
        ratio = found[1]
        for start in range(0, len(items), ratio.n):
            members = items[start : start + ratio.n]
            yield from _decide_unit(number, unit, chain.pre, members, ratio, sites, options, structure)
            unit += 1


def _kept(site: Site, chain: int, unit: int | None, item: Item, reason: str) -> Site:
    return replace(
        site, action="keep", reason=reason, chain=chain, unit=unit, role=item.role, convs=item.convs, behind=""
    )


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
    allowed = ratio.kept(len(members))
    few = len(owned) <= allowed
    asked = Unit(
        chain=chain,
        unit=unit,
        pre=pre,
        convs=tuple(item.convs for item in members),
        sites=tuple(sites[index].id for _, _, index in owned),
        owners=tuple(position for position, _, _ in owned),
        allowed=allowed,
    )
    stay = frozenset(range(len(owned))) if few else choose(options.keep, asked)
    size = len(members)
    share = f"unit of {size} has few enough" if few else f"unit of {size} keeps {allowed} of {len(owned)}"
    moved = max(stay, default=None) if options.relocate else None
    for place, (_, item, index) in enumerate(owned):
        site = _kept(sites[index], chain, unit, item, share)
        if place not in stay and site.locked:
            site = replace(site, reason=f"{share}, but this one cannot be dropped: {site.locked}")
        elif place not in stay:
            site = replace(site, action="drop")
        elif place == moved:
            site = _relocated(site, members[-1], pre, share, structure.activations[index].movable)
        yield index, site


def _relocated(site: Site, last: Item, pre: bool, share: str, movable: bool) -> Site:
    """The unit's last kept activation, moved to the unit's end where its last convolution has none."""
    if pre or last.act is not None:
        return site
    if site.locked or last.end is None or not movable:
        why = site.locked or last.end_reason or "it has parameters, whose names would change"
        return replace(site, reason=f"{share}; it stays in its place: {why}")
    return replace(site, action="move", behind=last.convs[0], reason=f"{share}, at the unit's end")
