"""A real vLLM server in a process of its own, from the virtual environment of `make test-vllm`."""

import contextlib
import os
import signal
import socket
import subprocess
import time

PYTHON = os.environ.get("GRPO_FUSED_VLLM_PYTHON")
ARGUMENTS = ["--served-model-name", "policy", "--host", "127.0.0.1", "--max-model-len", "128"]
ARGUMENTS += ["--max-num-seqs", "64", "--block-size", "32", "--enforce-eager"]
ARGUMENTS += ["--logprobs-mode", "processed_logprobs"]
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
ENVIRONMENT |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
ENVIRONMENT |= {"VLLM_HOST_IP": "127.0.0.1"}


class Process:
    """A server of the model in a folder.

    Attributes:
        url: where it will listen; it takes about a minute to start.
        log: the file that it writes to.
    """

    def __init__(self, model, folder, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder.mkdir(exist_ok=True)
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "vllm.log"
        command = [PYTHON, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--port", str(port), *ARGUMENTS, *arguments]
        environment = {**os.environ, **ENVIRONMENT, "HOME": str(folder)}
        environment.pop("PYTHONPATH", None)  # that of the tests
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self):
        """Ends the server and its engine at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self, seconds=30.0):
        """Ends the server, with all that it has started."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()
        self.process.wait()
        time.sleep(0.1)
