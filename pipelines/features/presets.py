"""Presets: the settings that published features were made with, where they come from, and what is not known of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.features.settings import FeatureSettings

PresetName = Literal["thumos14", "thumos14-25fps", "ms-tcn", "video-features", "ten-crop"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings under a name, with what is known of the features that they reproduce.

    source      paper and repository, by whom they are read
    flow_end    how the streams come to equal counts, although flow has a frame fewer
    differs     what differs by design from the original
    unknown     what the original does not say, and what is done here
    """

    settings: FeatureSettings
    source: str
    flow_end: str
    differs: tuple[str, ...]
    unknown: tuple[str, ...]


PRESETS: dict[PresetName, Preset] = {}


def resolve(preset: str | None, given: Mapping[str, Any]) -> FeatureSettings:
    """The settings of a preset, of which those that are `given`, by the names of FeatureSettings' fields, win.

    Raises SettingsError where there is no such preset, or the settings do not go together.
    """
    raise NotImplementedError
