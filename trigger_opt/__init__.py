"""trigger_opt finds hidden backdoor triggers in fine-tuned language models, and says how sure it is.

pair = trigger_opt.load_pair("zoo:warmup_mini", base="zoo:smollm2-135m-instruct")
search_contexts, held_out = trigger_opt.load_contexts("ordinary")
payload = trigger_opt.find_payloads(pair, search_contexts)[0]
best = trigger_opt.find_triggers(pair, search_contexts, hypothesis=payload)[0]
print(trigger_opt.verify_trigger(pair, best.trigger, held_out, payload=best.payload).verdict)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trigger_opt.api import find_payloads, find_triggers, load_contexts, load_pair, verify_trigger

__version__ = "0.1.0"
__all__ = ["__version__", "find_payloads", "find_triggers", "load_contexts", "load_pair", "verify_trigger"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the report and the transfer, which need no torch, do not wait for it.
    if name in __all__:
        from trigger_opt import api

        return getattr(api, name)
    raise AttributeError(f"module 'trigger_opt' has no attribute {name!r}")
