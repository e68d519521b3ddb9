"""A model's own run, recorded: on meta tensors, on a copy, with every function that it called."""

from nmconv.recording.answers import Answers, ModelRaised, NeedsData
from nmconv.recording.context import context_kept, context_now, is_recording
from nmconv.recording.functions import label_of
from nmconv.recording.inputs import Inputs, given_inputs, guessed_inputs
from nmconv.recording.methods import enclosed, unwrapped
from nmconv.recording.nodes import TENSOR, hook_sees, unknown
from nmconv.recording.record_modes import ENTRY_POINTS, Failure, Recordings, record, record_again, record_call
from nmconv.recording.recording import Call, Fact, Frame, Lines, Read, Recording, Spec
from nmconv.recording.rng_state import RngState, draws_randomness, rng_restored
from nmconv.recording.syntax_trees import NoSource, conditions, goes_one_way, parsed

__all__ = [
    "ENTRY_POINTS",
    "TENSOR",
    "Answers",
    "Call",
    "Fact",
    "Failure",
    "Frame",
    "Inputs",
    "Lines",
    "ModelRaised",
    "NeedsData",
    "NoSource",
    "Read",
    "Recording",
    "Recordings",
    "RngState",
    "Spec",
    "conditions",
    "context_kept",
    "context_now",
    "draws_randomness",
    "enclosed",
    "given_inputs",
    "goes_one_way",
    "guessed_inputs",
    "hook_sees",
    "is_recording",
    "label_of",
    "parsed",
    "record",
    "record_again",
    "record_call",
    "rng_restored",
    "unknown",
    "unwrapped",
]
