"""Running a model on the user's data: reading batches, restoring modes, and capturing values inside the model."""

from nmconv.observing.capture import Capture
from nmconv.observing.data import (
    Images,
    check_accepts,
    check_finite,
    device_and_dtype_of,
    input_errors_as_fit_errors,
    read_batches,
    read_images,
    to_device_and_dtype,
)
from nmconv.observing.forward_tracker import ForwardTracker, Hook
from nmconv.observing.modes import eval_mode

__all__ = [
    "Capture",
    "ForwardTracker",
    "Hook",
    "Images",
    "check_accepts",
    "check_finite",
    "device_and_dtype_of",
    "eval_mode",
    "input_errors_as_fit_errors",
    "read_batches",
    "read_images",
    "to_device_and_dtype",
]
