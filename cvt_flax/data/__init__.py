"""Examples to batches: the sources of images, and the engines that feed them to a step."""
