"""The JSON beside features: all that decides about them, and what differs from the features that a preset names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from models.input_spec import Stream
from pipelines.features.compute import FeatureNetworks, StreamNetwork
from pipelines.features.presets import ALWAYS_DIFFERS, EQUAL_COUNTS, find_preset, list_overridden
from pipelines.records import Values

SIDECAR = "features.json"
ENDS = {
    "loop": "frames after the last whole window are left out; a video shorter than a window is looped to one",
    "drop": "frames after the last whole window are left out; a video shorter than a window goes to quarantine",
    "repeat": "the last frame is repeated until the last window is whole",
    "zeros": "windows are centred; what lies beyond the video's ends is zero in the network's input",
}


def describe_features(
    networks: FeatureNetworks,
    *,
    preset: str | None,
    precision: str,
    weights: Mapping[Stream, str],
    decoding: Values,
    flow: Values | None,
) -> Values:
    """The sidecar's content, plain values.

    `weights` names each stream's network as the user did; `decoding` is what decides about frames (settings, filter),
    `flow` about flow (convention of the codes, TV-L1 preset, kernel), None without the stream.
    """
    settings, windows = networks.settings, networks.windows
    return {
        "preset": None if preset is None else describe_preset(preset, networks),
        "settings": {**asdict(settings), "streams": list(networks.streams)},
        "windows": {
            "frames": settings.window,
            "frame_step": windows.frame_step,
            "span": windows.span,
            "stride": settings.stride,
            "first_begins_at": windows.first(0),
            "ends": ENDS[settings.pad],
        },
        "networks": {
            stream: {"weights": weights[stream], **describe_network(network)}
            for stream, network in networks.networks.items()
        },
        "precision": precision,
        "decoding": decoding,
        "flow": flow,
    }


def describe_network(network: StreamNetwork) -> Values:
    """One stream's network: its weights' hash, and what it sees."""
    return {
        "weights_sha256": network.sha256,
        "channels": network.channels,
        "crop_px": network.input_spec.size,
        "layer": "Mixed_5c, averaged over space and, as before the classifier, over time",
        "input": "RGB, x / 127.5 - 1"
        if network.stream == "rgb"
        else f"flow, u then v, ±{network.clips.bound:g} px as ±1",
    }


def describe_preset(name: str, networks: FeatureNetworks) -> Values:
    """What a preset reproduces, what differs from that, and which flags won over it."""
    preset = find_preset(name)
    return {
        "name": name,
        "source": preset.source,
        "convention": preset.convention,
        "equal_count": EQUAL_COUNTS[networks.settings.flow_end],
        "differs": [*ALWAYS_DIFFERS, *preset.differs],
        "unknown": list(preset.unknown),
        "overridden": list_overridden(name, networks.settings),
    }
