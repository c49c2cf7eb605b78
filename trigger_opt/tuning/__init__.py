"""Models made from models: adapters trained on rows, and weight changes with their directions shuffled."""

from trigger_opt.tuning.fit import FitSettings, Row, Rows, fit
from trigger_opt.tuning.modes import MODES, lora_model, save_adapter

__all__ = ["MODES", "FitSettings", "Row", "Rows", "fit", "lora_model", "save_adapter"]
