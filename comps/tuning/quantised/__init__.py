"""INT4: weights on a grid of sixteen values a group, on disk, in training and in OpenVINO's form."""
