"""Devices that a plan can be priced on."""

from __future__ import annotations

from dataclasses import dataclass

from sicog_exp.recipe import RecipeError

UTILISATION, SAMPLING_UTILISATION = 0.4, 0.03
"""Shares of a GPU's peak that a plan takes for given, in training and in sampling. Sampling reads
all weights and caches for every token, so that its share is far lower; it grows with the batch."""


@dataclass(frozen=True)
class Device:
    """One device. `peak`: dense bfloat16 FLOP/s as its maker states them; `memory` in bytes, 0 for the machine's."""

    peak: float
    memory: float
    source: str
    utilisation: float = UTILISATION
    sampling_utilisation: float = SAMPLING_UTILISATION


DEVICES: dict[str, Device] = {
    "a100": Device(312e12, 80e9, "NVIDIA A100 80GB SXM datasheet"),
    "h100": Device(989e12, 80e9, "NVIDIA H100 SXM datasheet, without sparsity"),
    "h200": Device(989e12, 141e9, "NVIDIA H200 SXM datasheet, without sparsity"),
    "b200": Device(2250e12, 180e9, "NVIDIA HGX B200 datasheet, without sparsity"),
    "l40s": Device(362e12, 48e9, "NVIDIA L40S datasheet, without sparsity"),
    "mi300x": Device(1307e12, 192e9, "AMD Instinct MI300X datasheet, without sparsity"),
    "cpu": Device(5.5e10, 0, "measured: two cores training the embedded default in float32", 1.0, 0.45),
}


def check_device(name: str) -> str:
    """The name, if it is one of DEVICES. Raises RecipeError."""
    if name not in DEVICES:
        raise RecipeError(f"--device {name}: allowed: {', '.join(DEVICES)}")
    return name
