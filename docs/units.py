"""Draw docs/units.svg: a chain of convolutions at 1:1, at 2:1, and merged."""

from pathlib import Path

WIDTH, HEIGHT = 760, 250
AS_IT_IS = ("conv", "act") * 4
CONVERTED = ("conv", "gone", "conv", "act") * 2
MERGED = ("wide", "", "", "act") * 2
STEP, LEFT, BOX = 72, 160, 56
COLORS = {"conv": "#4c72b0", "wide": "#4c72b0", "act": "#dd8452"}
TEXTS = {"conv": "conv", "wide": "one conv", "act": "act"}


def rectangle(x: float, y: float, width: float, radius: int, style: str) -> str:
    """Draw a rectangle of a box's height around `y`."""
    return f'<rect x="{x}" y="{y - 16}" width="{width}" height="32" rx="{radius}" {style}/>'


def box(kind: str, at: int, y: int) -> str:
    """Draw one operation, the `at`-th of its row."""
    x, width = LEFT + at * STEP, BOX + 2 * STEP if kind == "wide" else BOX
    if kind == "gone":
        return rectangle(x, y, width, 16, 'fill="white" fill-opacity="0" stroke="#bbb" stroke-dasharray="4 4"')
    shape = rectangle(x, y, width, 16 if kind == "act" else 4, f'fill="{COLORS[kind]}"')
    return shape + f'<text x="{x + width / 2:g}" y="{y + 5}" fill="white" text-anchor="middle">{TEXTS[kind]}</text>'


def svg() -> str:
    """Draw the picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    rows = {"as it is, 1:1": AS_IT_IS, "converted, 2:1": CONVERTED, "merged": MERGED}
    for number, (title, kinds) in enumerate(rows.items()):
        y = 45 + 80 * number
        parts.append(f'<text x="16" y="{y + 5}" fill="#222">{title}</text>')
        parts.append(f'<line x1="{LEFT - 20}" y1="{y}" x2="{LEFT + 8 * STEP}" y2="{y}" stroke="#888"/>')
        parts += [box(kind, at, y) for at, kind in enumerate(kinds) if kind]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(svg())
