"""What a person looks at after a check: a histogram of lengths and a sheet of suspicious images."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from morebench.data.aside import replace_file
from morebench.data.checked import Manifest
from morebench.data.findings import Finding, Kind
from morebench.data.image_folder import ImageFolder
from morebench.data.images import load_image
from morebench.errors import DataError

LENGTHS, SUSPICIOUS = "lengths.png", "suspicious.png"
COLUMNS, MAX_TILES, MAX_UNSEEN = 6, 60, 2
TILE, CAPTION, MARGIN = 200, 46, 8  # pixels
GREY, RED, INK = (225, 225, 225), (170, 30, 30), (40, 40, 40)


def draw_lengths(manifest: Manifest, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    wanted = [("characters", manifest.characters)]
    wanted += [(f"tokens, {name}", facts) for name, facts in manifest.tokens.items()]
    figure = Figure(figsize=(7, 2.6 * len(wanted)), layout="constrained")
    axes = figure.subplots(len(wanted), squeeze=False)[:, 0]
    for axis, (label, facts) in zip(axes, wanted, strict=True):
        if facts["counts"]:
            axis.stairs(facts["counts"], facts["edges"], fill=True, color="#4477aa")
            told = ", ".join(
                f"{'max' if q == '100' else f'{q} %'} {value:,}" for q, value in facts["quantiles"].items()
            )
            axis.set_title(f"{label} a sample: {told}", fontsize=9)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel("samples")
    axes[0].annotate(
        f"{manifest.label}: {manifest.num_samples:,} samples",
        (0, 1.22),
        xycoords="axes fraction",
        fontsize=10,
    )
    replace_file(path, lambda aside: figure.savefig(aside, format="png", dpi=110))


def draw_suspicious(findings: Sequence[Finding], images: ImageFolder, path: Path) -> None:
    """Kind by kind, each with its share of the sheet. Without findings, no sheet."""
    shown = _chosen(findings)
    if not shown:
        path.unlink(missing_ok=True)
        return
    rows = -(-len(shown) // COLUMNS)
    height = TILE + CAPTION + MARGIN
    sheet = Image.new("RGB", (COLUMNS * (TILE + MARGIN) + MARGIN, rows * height + MARGIN), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, finding in enumerate(shown):
        row, column = divmod(number, COLUMNS)
        left, top = MARGIN + column * (TILE + MARGIN), MARGIN + row * height
        sheet.paste(_tile(finding, images), (left, top))
        colour = RED if finding.kind.quarantines else INK
        lines = [*_wrapped(finding.kind.value, font), _end(finding.image or "", font)]
        draw.multiline_text((left, top + TILE + 2), "\n".join(lines), colour, font, spacing=1)
    replace_file(path, lambda aside: sheet.save(aside, "PNG"))


def _chosen(findings: Sequence[Finding]) -> list[Finding]:
    of_kind: dict[Kind, dict[str, Finding]] = defaultdict(dict)
    for finding in findings:
        of_kind[finding.kind].setdefault(finding.image or "", finding)
    seen = [kind for kind in of_kind if not kind.quarantines]  # the others can hardly be shown
    room = (MAX_TILES - MAX_UNSEEN * (len(of_kind) - len(seen))) // max(1, len(seen))
    limits = {kind: MAX_UNSEEN if kind.quarantines else room for kind in of_kind}
    in_order = sorted(of_kind, key=list(Kind).index)
    return [finding for kind in in_order for finding in islice(of_kind[kind].values(), limits[kind])]


def _tile(finding: Finding, images: ImageFolder) -> Image.Image:
    """What cannot be used is not decoded here: it may be what ended a process."""
    tile = Image.new("RGB", (TILE, TILE), GREY)
    try:
        image = None if finding.kind.quarantines else load_image(images.path(finding.image or ""))
    except DataError:  # gone since
        image = None
    if image is None:
        ImageDraw.Draw(tile).line((0, 0, TILE, TILE), RED, 2)
        return tile
    image.thumbnail((TILE, TILE))
    tile.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return tile


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= TILE:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:2]


def _end(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A path's end tells more than its beginning."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    while font.getlength(shown) > TILE:
        shown = f"…{shown[max(2, len(shown) // 20 + 1) :]}"
    return shown
