"""What fine-tuning did to the weights: is this the right base, which tensors changed, at what rank."""

from trigger_opt.weight_diff.diff import diff_weights
from trigger_opt.weight_diff.identity import identify
from trigger_opt.weight_diff.tensors import precision_note

__all__ = ["diff_weights", "identify", "precision_note"]
