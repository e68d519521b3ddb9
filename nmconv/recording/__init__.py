"""A model's own run, recorded: on meta tensors, on a copy, with every function that it called."""

from nmconv.recording._answers import Answers, ModelRaised, NeedsData
from nmconv.recording._chance import Chance, chance_restored, is_chance
from nmconv.recording._context import context_kept, context_now
from nmconv.recording._copy import Copy, check_copy, meta_copy, real_copy, shared_on_copy, structure_copy
from nmconv.recording._functions import label_of
from nmconv.recording._inputs import Inputs, given_inputs, guessed_inputs
from nmconv.recording._methods import enclosed, unwrapped
from nmconv.recording._nodes import TENSOR, hook_sees, unknown
from nmconv.recording._noted import is_recording
from nmconv.recording._record import ENTRY_POINTS, Failure, Recordings, record, record_again, record_call
from nmconv.recording._recorder import Recorder
from nmconv.recording._records import Call, Fact, Frame, Lines, Read, Recording, Spec

__all__ = [
    "ENTRY_POINTS",
    "TENSOR",
    "Answers",
    "Call",
    "Chance",
    "Copy",
    "Fact",
    "Failure",
    "Frame",
    "Inputs",
    "Lines",
    "ModelRaised",
    "NeedsData",
    "Read",
    "Recorder",
    "Recording",
    "Recordings",
    "Spec",
    "chance_restored",
    "check_copy",
    "context_kept",
    "context_now",
    "enclosed",
    "given_inputs",
    "guessed_inputs",
    "hook_sees",
    "is_chance",
    "is_recording",
    "label_of",
    "meta_copy",
    "real_copy",
    "record",
    "record_again",
    "record_call",
    "shared_on_copy",
    "structure_copy",
    "unknown",
    "unwrapped",
]
