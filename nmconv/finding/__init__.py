"""What is in a model: activation sites, chains of convolutions, linear runs and residual branches."""

from nmconv.finding.argument_choices import deciding_arguments
from nmconv.finding.def_use import NORM, SUM, DefUse, ValueLocation
from nmconv.finding.fingerprints import fingerprint
from nmconv.finding.flow_analysis import flows_of
from nmconv.finding.map_sizes import map_shapes
from nmconv.finding.residual_branches import Residual, copied_sums, residuals
from nmconv.finding.run_elements import (
    Element,
    LinearRun,
    ParallelSum,
    Step,
    argument_structures,
    conv_names,
    elements_from_json,
    elements_to_json,
    steps_of,
    without_trailing_identities,
)
from nmconv.finding.runs import linear_runs
from nmconv.finding.structure_assembly import structure_of

__all__ = [
    "NORM",
    "SUM",
    "DefUse",
    "Element",
    "LinearRun",
    "ParallelSum",
    "Residual",
    "Step",
    "ValueLocation",
    "argument_structures",
    "conv_names",
    "copied_sums",
    "deciding_arguments",
    "elements_from_json",
    "elements_to_json",
    "fingerprint",
    "flows_of",
    "linear_runs",
    "map_shapes",
    "residuals",
    "steps_of",
    "structure_of",
    "without_trailing_identities",
]
