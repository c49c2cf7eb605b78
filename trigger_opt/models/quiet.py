"""Libraries that would talk over a run."""

import logging
import os
import warnings


def quieten_libraries() -> None:
    """No progress bars and warnings of transformers and bitsandbytes, and no idle threads that keep cores busy: for
    programs, not for library use."""
    # Only before torch is imported: with the default, a busy neighbour makes every small product 60 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for library in ("transformers", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
