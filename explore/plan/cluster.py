"""A number of devices of one kind, and the links between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from explore.roofline import Hardware, hardware

LinkName = Literal["domain", "network"]
LINKS: tuple[LinkName, ...] = ("domain", "network")


@dataclass(frozen=True)
class Cluster:
    """Devices in domains that share a fast link, and a network between the domains."""

    device: Hardware
    n_gpus: int

    def __post_init__(self) -> None:
        if self.n_gpus < 1:
            raise ValueError(f"cluster: the number of GPUs must be at least 1, got {self.n_gpus}")

    @classmethod
    def named(cls, text: str) -> Cluster:
        """Reads `GB200x256`, or `FILE.jsonx256` for a custom device.

        Raises:
            ValueError: not of that form, or an unknown device.
        """
        match = re.fullmatch(r"(.+)x(\d{1,9})", text)
        if match is None:
            raise ValueError(f"cluster must be DEVICExNUMBER, such as GB200x256, got {text[:80]!r}")
        return cls(hardware(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        return f"{self.device.name}x{self.n_gpus}"

    @property
    def domain_size(self) -> int:
        """Devices of this cluster that share the fast link."""
        return min(self.device.domain_size, self.n_gpus)

    @property
    def usable_bytes(self) -> float:
        """Memory available on one device after the driver's share."""
        return self.device.usable_bytes or self.device.memory_bytes

    def rate(self, link: LinkName) -> float:
        """Bytes per second of a device over a link, one direction."""
        return self.device.link if link == "domain" else (self.device.network or self.device.link)

    def link_of(self, span: int) -> LinkName:
        """The slowest link in a group that `span` neighbouring ranks hold."""
        return "domain" if span <= self.domain_size else "network"


LINK_EFFICIENCY: Mapping[tuple[str, LinkName], float] = MappingProxyType(
    {("GB200", "domain"): 0.60, ("H100", "domain"): 0.64, ("", "domain"): 0.62, ("", "network"): 0.75}
)
"""Fraction of a link's rate that an all-to-all reaches, by device; the empty name is for all others.

Source: fitted to the sixteen times of HybridEP in arXiv 2603.07685, table 7.
"""
