"""The Ray Tune search over temporal strides and pooling inflation."""
