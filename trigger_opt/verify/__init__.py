"""From a string to a verdict: held-out contexts, base and controls on the same inputs, matched random strings."""

from trigger_opt.answers import is_manner, payload_words
from trigger_opt.verify.manner import payloads_to_judge
from trigger_opt.verify.minimise import minimise
from trigger_opt.verify.rates import Memo, VerifySettings, common_answer, verify_string
from trigger_opt.verify.rule import RULE_TEXT, Thresholds, best_verification, detection_score, judge

__all__ = [
    "RULE_TEXT",
    "Memo",
    "Thresholds",
    "VerifySettings",
    "best_verification",
    "common_answer",
    "detection_score",
    "is_manner",
    "judge",
    "minimise",
    "payload_words",
    "payloads_to_judge",
    "verify_string",
]
