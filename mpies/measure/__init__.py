"""What is measured of a model: rewards and metrics of its answers, divergence and distance from the start."""
