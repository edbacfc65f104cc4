"""From videos to the features that others train on: windows, crops, I3D's vectors, published layouts, presets."""
