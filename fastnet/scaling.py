"""Compound scaling (Tan & Le 2019, "EfficientNet: Rethinking Model Scaling for CNNs", section 3.3).

One number phi scales depth by alpha^phi, width by beta^phi and resolution by gamma^phi, with
alpha·beta²·gamma² ≈ 2 so that the arithmetic doubles with each step of phi. The published B1–B7 depart from
the pure powers: their coefficients are the table below, and the default, because published weights need them.

``python -m fastnet.scaling`` prints both families and the commonly quoted rounded coefficients with their
parameter counts as a Markdown table.
"""

import math
from dataclasses import dataclass
from typing import get_args

from fastnet.arch import EFFICIENTNET, VARIANTS, Network, Scaling, coefficients, family, scaled

BASE_RESOLUTION = 200  # Food-101's longest side is 512: 200·gamma^phi stays below it up to B6.
BASE_OFFICIAL_RESOLUTION = 224
RESOLUTION_GAMMA = 1.15

SCALED = tuple(variant for variant in VARIANTS if family(variant) is EFFICIENTNET)
"""B0–B7 in order: the models of phi = 0 … 7."""
# variant: (depth, width) as often quoted from the rule; not what the published weights have.
QUOTED: dict[str, tuple[float, float]] = {
    "b1": (1.1, 1.1),
    "b2": (1.2, 1.1),
    "b4": (1.4, 1.2),
    "b7": (2.0, 1.4),
}


@dataclass(frozen=True)
class Architecture:
    """What scaling decides about a model.

    name: a variant's, or "phi=1.5".
    width, depth: multipliers of B0's channels and repeats.
    resolution: side in pixels on Food-101: round8(200·1.15^phi) for B0–B7, the published one for others.
    official_resolution: side in pixels of the published ImageNet training.
    dropout, drop_connect_rate: probabilities in [0, 1).
    """

    name: str
    width: float
    depth: float
    resolution: int
    official_resolution: int
    dropout: float
    drop_connect_rate: float
    scaling: Scaling = "published"

    @property
    def network(self) -> Network:
        return scaled(family(self.name), self.width, self.depth)


def round_resolution(resolution: float, multiple: int = 8) -> int:
    """The nearest multiple of ``multiple`` pixels (halves up), at least one multiple."""
    if resolution <= 0 or multiple <= 0:
        raise ValueError(f"resolution and multiple must be positive, got {resolution} and {multiple}.")
    return max(1, math.floor(resolution / multiple + 0.5)) * multiple


@dataclass(frozen=True)
class CompoundScaler:
    """The pure rule: depth alpha^phi, width beta^phi, resolution base·gamma^phi, for any real phi ≥ 0.

    The paper's grid search gives alpha 1.2, beta 1.1, gamma 1.15: alpha·beta²·gamma² is 1.92. 1.9 to 2.1 is
    accepted. Raises ValueError otherwise, or where a coefficient is below 1 or phi negative or infinite.
    """

    phi: float
    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15

    def __post_init__(self) -> None:
        if not (math.isfinite(self.phi) and self.phi >= 0):
            raise ValueError(f"phi must be a finite number of 0 or more, got {self.phi}.")
        if not min(self.alpha, self.beta, self.gamma) >= 1:
            raise ValueError(
                f"alpha, beta and gamma must be 1 or more, got {self.alpha}, {self.beta} and {self.gamma}."
            )
        product = self.alpha * self.beta**2 * self.gamma**2
        if not abs(product - 2) <= 0.1:
            raise ValueError(
                f"alpha·beta²·gamma² must be about 2 (1.9 to 2.1), got {product:.3f} from alpha "
                f"{self.alpha}, beta {self.beta}, gamma {self.gamma}."
            )

    @property
    def depth(self) -> float:
        return self.alpha**self.phi

    @property
    def width(self) -> float:
        return self.beta**self.phi

    def resolution(self, base: int = BASE_RESOLUTION) -> int:
        """Side in pixels: base·gamma^phi, rounded to a multiple of 8."""
        return round_resolution(base * self.gamma**self.phi)

    def architecture(self) -> Architecture:
        """The model of this phi; its drop rates follow the published steps."""
        return Architecture(
            name=f"phi={self.phi:g}",
            width=self.width,
            depth=self.depth,
            resolution=self.resolution(),
            official_resolution=self.resolution(BASE_OFFICIAL_RESOLUTION),
            dropout=_drop_rate(self.phi),
            drop_connect_rate=_drop_rate(self.phi),
            scaling="compound",
        )


def _drop_rate(phi: float) -> float:
    """Dropout and drop-connect alike: 0.2 (B0, B1), 0.3 (B2, B3), 0.4 (B4, B5), 0.5 (B6, B7 and above)."""
    return (2 + min(int(phi // 2), 3)) / 10


def architecture(variant: str = "b0", scaling: Scaling = "published") -> Architecture:
    """A variant by name: the published coefficients, or ("compound", for B0–B7) the pure powers with phi = 0 … 7."""
    published = coefficients(variant)
    if scaling not in get_args(Scaling):
        raise ValueError(f"unknown scaling {scaling!r}: choose one of {', '.join(get_args(Scaling))}.")
    width, depth, resolution = published.width, published.depth, published.resolution
    if variant in SCALED:
        scaler = CompoundScaler(SCALED.index(variant), gamma=RESOLUTION_GAMMA)
        resolution = scaler.resolution()
        if scaling == "compound":
            width, depth = scaler.width, scaler.depth
    elif scaling == "compound":
        raise ValueError(f"{variant} has published coefficients only: leave out --scaling compound.")
    return Architecture(
        name=variant,
        width=width,
        depth=depth,
        resolution=resolution,
        official_resolution=published.resolution,
        dropout=published.dropout,
        drop_connect_rate=published.drop_connect_rate,
        scaling=scaling,
    )


def markdown_table(num_classes: int = 1000) -> str:
    """Width, depth and parameters of the published, the pure and the quoted coefficients, as Markdown."""

    def cell(width: float, depth: float) -> str:
        return f"{depth:.2f} / {width:.2f} | {scaled(EFFICIENTNET, width, depth).parameters(num_classes) / 1e6:.2f} M"

    lines = [
        "| | published (used): depth / width | parameters | alpha^phi / beta^phi (`--scaling compound`) "
        "| parameters | often quoted: depth / width | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in SCALED:
        published, compound = architecture(variant), architecture(variant, "compound")
        quoted = "– | –"
        if variant in QUOTED:
            depth, width = QUOTED[variant]
            quoted = cell(width, depth)
        lines.append(
            f"| {variant.upper()} | {cell(published.width, published.depth)} "
            f"| {cell(compound.width, compound.depth)} | {quoted} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
