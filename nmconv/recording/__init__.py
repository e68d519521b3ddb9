"""Recordings of a model's runs: each call of a copy on meta tensors becomes a node of an fx graph."""

from nmconv.recording.answers import Answers, ModelRaised, NeedsData
from nmconv.recording.call_recording import record_again, record_call
from nmconv.recording.context import context_restored, current_context, is_recording
from nmconv.recording.function_code import NoSource, conditions, is_branchless, syntax_tree, unwrapped
from nmconv.recording.inputs import Inputs, given_inputs, guessed_inputs
from nmconv.recording.model_recordings import ENTRY_POINTS, Failure, Recordings, record
from nmconv.recording.nodes import TENSOR, unknown, user_hook
from nmconv.recording.recording import Call, Fact, Frame, Lines, Read, Recording
from nmconv.recording.rng_state import RngState, is_rng, rng_restored
from nmconv.recording.tensors import Spec
from nmconv.recording.torch_functions import label_of

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
    "context_restored",
    "current_context",
    "given_inputs",
    "guessed_inputs",
    "is_branchless",
    "is_recording",
    "is_rng",
    "label_of",
    "record",
    "record_again",
    "record_call",
    "rng_restored",
    "syntax_tree",
    "unknown",
    "unwrapped",
    "user_hook",
]
