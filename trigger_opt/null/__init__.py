"""The null distribution: the identical search on models that hide nothing, and what it says of the suspect's finding.

rule           scores of controls to a p-value, and to a verdict that stands or is taken back
controls       which controls there are, and how they are made
runs           one control's run, in a folder of its own within the suspect's
distribution   all of them, one after another
of_jobs        what nulls of a sweep's jobs say of what was collected from all of them
"""

from trigger_opt.null.distribution import hold_against_null
from trigger_opt.null.of_jobs import held_against_jobs
from trigger_opt.null.rule import null_result, p_value

__all__ = ["held_against_jobs", "hold_against_null", "null_result", "p_value"]
