"""Presets: the settings that published features were made with, where they come from, and what is not known of them.

Windows, rates, sizes and layouts are the originals'. Frames, flow and weights are not byte for byte: decoders, resize
filters and implementations of TV-L1 differ, and so a preset says where. A flag that is given wins over its preset.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from pipelines.errors import SettingsError
from pipelines.features.settings import FeatureSettings, FlowEnd

PresetName = Literal["thumos14", "thumos14-25fps", "ms-tcn", "video-features", "ten-crop"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings under a name, with what is known of the features that they reproduce; all of it goes into the sidecar.

    source       paper and repository, and who reads such features
    convention   frames, windows and files, in words
    differs      what differs by design from the original, beside what differs in all presets
    unknown      what the original does not say, and what is done here
    """

    settings: FeatureSettings
    source: str
    convention: str
    differs: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def equal_count(self) -> str:
        """How the streams come to equal counts, although flow has a frame fewer."""
        return EQUAL_COUNTS[self.settings.flow_end]


EQUAL_COUNTS: dict[FlowEnd, str] = {
    "repeat": "n counts RGB frames; the last frame, which has no flow to a next one, gets that of the frame before",
    "zero": "n counts RGB frames; the last frame, which has no flow to a next one, gets zeros",
    "shorten": "n counts RGB frames, of which the last, which has no flow to a next one, is left out of both streams",
}

ALWAYS_DIFFERS = (
    "frames are decoded and resized by FFmpeg's swscale (bilinear, averaging where it shrinks), and not by OpenCV "
    "or PIL",
    "flow is TV-L1 by this package's own kernel; its codes have 1023 levels (with shards, those of the shards) and "
    "a code for zero, where JPEG pairs have 256 levels and none",
)

PRESETS: dict[PresetName, Preset] = {
    "thumos14": Preset(
        settings=FeatureSettings(
            fps="native", window=16, stride=4, pad="drop", flow_end="repeat", resize="340x256", layout="npy"
        ),
        source=(
            "ActionFormer (Zhang et al., ECCV 2022; github.com/happyharrycn/actionformer_release) and OpenTAD "
            "(github.com/sming256/OpenTAD) read these features of THUMOS'14, which were first published with CMCS "
            "(Liu et al., CVPR 2019; github.com/Finspire13/CMCS-Temporal-Action-Localization) and made by "
            "github.com/Finspire13/pytorch-i3d-feature-extraction"
        ),
        convention=(
            "every frame of the file (about 30 a second) at 340×256, centre 224; windows of 16 frames, a new one "
            "every 4, ⌊(n - 16) / 4⌋ + 1 of n frames; ID.npy, (T, 2048) float32, RGB then flow"
        ),
        unknown=(
            "whether the features that ActionFormer links to are of the centre or a mean over ten crops: here the "
            "centre",
            "the filter by which frames became 340×256",
            "how the last frame was treated: the counts that users report fit either",
        ),
    ),
    "thumos14-25fps": Preset(
        settings=FeatureSettings(
            fps=25.0, window=16, stride=16, pad="drop", flow_end="repeat", resize="256", layout="npy-streams"
        ),
        source=(
            "weakly supervised localisation on THUMOS'14: W-TALC (Paul et al., ECCV 2018), BaS-Net (Lee et al., AAAI "
            "2020; github.com/Pilhyeon/BaSNet-pytorch), whose loaders take a folder for each stream"
        ),
        convention=(
            "25 frames a second, shorter side 256, centre 224; windows of 16 frames that do not overlap, ⌊n / 16⌋ of "
            "n frames; rgb/ID.npy and flow/ID.npy, (T, 1024) float32 each"
        ),
        unknown=(
            "how videos were brought to 25 frames a second (here: the frame on show at each tick, as by FFmpeg's "
            "fps filter)",
        ),
    ),
    "ms-tcn": Preset(
        settings=FeatureSettings(
            fps="native", window=21, stride=1, pad="zeros", flow_end="zero", resize="256", layout="npy-transposed"
        ),
        source=(
            "MS-TCN (Abu Farha and Gall, CVPR 2019; github.com/yabufarha/ms-tcn) and what follows it on Breakfast, "
            "50Salads and GTEA; made by github.com/ahsaniqbal/Kinetics-FeatureExtractor"
        ),
        convention=(
            "every frame of the file (15 or 30 a second), shorter side 256, centre 224, (x - 127.5) / 127.5; one "
            "window a frame, of the 21 frames t - 10 to t + 10; ID.npy, (2048, T) float32, RGB then flow"
        ),
        differs=("flow keeps 1023 levels within ±20 px, where the extractor passed it on in floats",),
        unknown=(
            "what lies beyond the ends: the authors say zeros (issue 34 of their repository), which is done here; "
            "the extractor's published code repeats the first and the last frame, whose flow is zero",
            "zero of what: here of the network's input, which is mid-grey in RGB",
        ),
    ),
    "video-features": Preset(
        settings=FeatureSettings(
            fps="native", window=64, stride=64, pad="drop", flow_end="shorten", resize="256", layout="video-features"
        ),
        source="video_features (Iashin; github.com/v-iashin/video_features), feature type i3d, as it is without flags",
        convention=(
            "every frame of the file, or --fps, shorter side 256, centre 224; windows of 64 frames that do not "
            "overlap, of the frames that have flow: ⌊(n - 1) / 64⌋ of n frames; ID_rgb.npy, ID_flow.npy (T, 1024), "
            "ID_fps.npy, and ID_timestamps_ms.npy (T,), the time at which each window ends"
        ),
        differs=(
            "flow is TV-L1, on which DeepMind's network was trained, where video_features takes RAFT (PWC-Net in "
            "older versions) and rounds it to 256 levels",
            "vectors are float32, where video_features writes float64 of the same digits",
            "a video shorter than 65 frames goes to quarantine, where video_features writes empty arrays",
        ),
    ),
    "ten-crop": Preset(
        settings=FeatureSettings(
            fps="native", window=16, stride=16, pad="drop", flow_end="repeat", resize="256", crops=10, layout="npy"
        ),
        source=(
            "weakly supervised anomaly detection on UCF-Crime and ShanghaiTech: RTFM (Tian et al., ICCV 2021; "
            "github.com/tianyu0207/RTFM) and what follows it"
        ),
        convention=(
            "every frame of the file, shorter side 256; windows of 16 frames that do not overlap, ⌊n / 16⌋ of n "
            "frames; ten crops of 224; ID.npy, (T, 10, 1024) of one stream or (T, 10, 2048) of both, float32, RGB "
            "then flow"
        ),
        differs=(
            "the network is Inception-I3D, 1024 channels a stream; RTFM's 2048 channels are of the RGB stream of an "
            "I3D on ResNet-50, so its --feature-size follows the streams given here",
            "the order of the crops is four corners, centre, then their mirrors; readers take a mean over them or "
            "treat them alike",
        ),
        unknown=("the size before the crop, 340×256 in some extractors: --resize 340x256 gives that",),
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of a name. Raises SettingsError."""
    if name not in PRESETS:
        raise SettingsError(f"--preset is {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def list_overridden(name: str, settings: FeatureSettings) -> dict[str, object]:
    """Settings that are others than the preset's, with the preset's value."""
    own = find_preset(name).settings
    # Which streams there are is no part of a preset.
    names = [field.name for field in fields(settings) if field.name != "streams"]
    return {field: getattr(own, field) for field in names if getattr(own, field) != getattr(settings, field)}
