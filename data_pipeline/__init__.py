"""Offline preprocessing: songs to the datasets `windows` and `latents`, with Beam. The only room that imports TensorFlow."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # must be said before TensorFlow is imported
