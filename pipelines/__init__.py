"""The data's way and the three Ray pipelines: extraction, training, search."""
