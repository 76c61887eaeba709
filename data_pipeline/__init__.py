"""Offline preprocessing: songs to the datasets `windows` and `latents`, with Beam and TensorFlow Datasets."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # must be said before TensorFlow is imported
