"""Payload hypotheses: what the fine-tuned model wants to say, found without knowing any trigger."""

from trigger_opt.hypotheses.amplify import amplified
from trigger_opt.hypotheses.find import HypothesisSettings, find_hypotheses, read_off

__all__ = ["HypothesisSettings", "amplified", "find_hypotheses", "read_off"]
