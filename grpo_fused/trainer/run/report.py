"""What a command says to its user: one message for all ranks of a run, and plain warnings."""

import contextlib
import datetime
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator

from tqdm import tqdm

from grpo_fused.trainer.run.errors import OtherRankError

# Libraries whose deprecations are for us to mend, not for the user of a command.
LIBRARIES = "accelerate|datasets|huggingface_hub|peft|tensorboard|torch|transformers"


def report_error(command: str, error: BaseException | str) -> None:
    """Prints an error in one line, on the first rank that has one to report.

    A launcher of torch prints its own summary when a rank fails; the message is in it as well.
    """
    if not isinstance(error, OtherRankError) and _is_first_report():
        print(f"{command}: {error}", file=sys.stderr, flush=True)
        record(str(error))


def record(text: str) -> None:
    """Tells a launcher of torch what ended this rank, in the format of its `ErrorHandler`.

    That itself would write the traceback, which the command does not show either.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def _is_first_report() -> bool:
    """Asks the store of the launcher whether another rank has reported; without one, False."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    key = f"grpo_fused/reports/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        patience = datetime.timedelta(seconds=5)
        return dist.TCPStore(address, port, is_master=False, timeout=patience).add(key, 1) == 1
    except RuntimeError:  # the launcher is gone
        return True


@contextlib.contextmanager
def plain_warnings(command: str) -> Iterator[None]:
    """Prints warnings of this package in one line above a progress bar, those of others as usual.

    Deprecations that libraries see in one another are left out.
    """

    def show(message, category, filename, lineno, file=None, line=None):
        if f"{os.sep}grpo_fused{os.sep}" in filename and category is UserWarning:
            tqdm.write(f"{command}: {message}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"({LIBRARIES})\b")
        yield
