"""HTML pages of what the pipelines wrote."""
