"""The JSON beside features: all that decides about them, and what differs from the features that a preset names."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.features.compute import FeatureNetworks
from pipelines.records import Values

SIDECAR = "features.json"


def describe_features(
    networks: FeatureNetworks,
    *,
    preset: str | None,
    precision: str,
    weights: Mapping[str, str],
    decoding: Values,
    flow: Values | None,
) -> Values:
    """The sidecar's content.

    `weights` names each stream's network as the user did; `decoding` is what decides about frames (settings, filter),
    `flow` about flow (convention of the codes, TV-L1 preset, kernel), None without the stream.
    """
    raise NotImplementedError
