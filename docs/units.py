"""Draw docs/units.svg: a chain of convolutions at 1:1, at 2:1, and merged."""

from pathlib import Path

WIDTH, HEIGHT = 760, 250
ROWS = (
    (
        "as it is, 1:1",
        (("conv", 0), ("act", 1), ("conv", 2), ("act", 3), ("conv", 4), ("act", 5), ("conv", 6), ("act", 7)),
    ),
    (
        "converted, 2:1",
        (("conv", 0), ("gone", 1), ("conv", 2), ("act", 3), ("conv", 4), ("gone", 5), ("conv", 6), ("act", 7)),
    ),
    ("merged", (("wide", 0), ("act", 3), ("wide", 4), ("act", 7))),
)
STEP, LEFT, BOX = 72, 160, 56
COLORS = {"conv": "#4c72b0", "wide": "#4c72b0", "act": "#dd8452"}
TEXTS = {"conv": "conv", "wide": "one conv", "act": "act"}


def box(kind: str, at: int, y: int) -> str:
    """One operation."""
    x, width = LEFT + at * STEP, BOX + 2 * STEP if kind == "wide" else BOX
    if kind == "gone":
        line = f'<line x1="{x - 16}" y1="{y}" x2="{x + BOX + 16}" y2="{y}" stroke="#888"/>'
        return (
            line
            + f'<rect x="{x}" y="{y - 16}" width="{BOX}" height="32" rx="16" fill="none" stroke="#bbb" stroke-dasharray="4 4"/>'
        )
    radius = 16 if kind == "act" else 4
    shape = f'<rect x="{x}" y="{y - 16}" width="{width}" height="32" rx="{radius}" fill="{COLORS[kind]}"/>'
    return shape + f'<text x="{x + width / 2:g}" y="{y + 5}" fill="white" text-anchor="middle">{TEXTS[kind]}</text>'


def svg() -> str:
    """The picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for number, (title, boxes) in enumerate(ROWS):
        y = 45 + 80 * number
        parts.append(f'<text x="16" y="{y + 5}" fill="#222">{title}</text>')
        parts.append(f'<line x1="{LEFT - 20}" y1="{y}" x2="{LEFT + 8 * STEP}" y2="{y}" stroke="#888"/>')
        parts += [box(kind, at, y) for kind, at in boxes]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(svg())
