"""What is in a model: activation sites, chains of convolutions, linear runs and residual branches."""

from nmconv.finding.argument_choices import chosen_by
from nmconv.finding.def_use import NORM, SUM, DefUse, ValueLocation
from nmconv.finding.fingerprints import fingerprint
from nmconv.finding.flow_analysis import flows_of
from nmconv.finding.map_sizes import shapes_of
from nmconv.finding.residual_branches import Residual, copied_sums, residuals
from nmconv.finding.run_elements import (
    Element,
    Join,
    LinearRun,
    Step,
    elements_from,
    steps_of,
    takes_in,
    text_of,
    without_end,
)
from nmconv.finding.runs import linear_runs
from nmconv.finding.structure_assembly import read

__all__ = [
    "NORM",
    "SUM",
    "DefUse",
    "Element",
    "Join",
    "LinearRun",
    "Residual",
    "Step",
    "ValueLocation",
    "chosen_by",
    "copied_sums",
    "elements_from",
    "fingerprint",
    "flows_of",
    "linear_runs",
    "read",
    "residuals",
    "shapes_of",
    "steps_of",
    "takes_in",
    "text_of",
    "without_end",
]
