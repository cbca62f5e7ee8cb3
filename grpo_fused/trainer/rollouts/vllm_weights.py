"""How vLLM servers get the weights of the policy: a folder that they read, an adapter, or NCCL."""

import contextlib
import shutil
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from grpo_fused.trainer.reference import full_tensor, is_peft_model, reshard
from grpo_fused.trainer.rollouts.vllm_server import ServerError, VLLMServer
from grpo_fused.trainer.run.checkpoint import write_together
from grpo_fused.trainer.run.errors import RolloutError
from grpo_fused.trainer.run.state import write_model

LOCAL = ("localhost", "127.0.0.1", "::1")
ADAPTER = "grpo-fused"  # the name that servers know the adapter by


def make_transfer(trainer) -> "FolderTransfer | NCCLTransfer":
    """Returns the transfer that the config names.

    Raises:
        ValueError: the policy has adapters and the transfer is of whole weights, or the reverse;
            it is NCCL and the policy is not on a CUDA device.
    """
    config, device = trainer.config, trainer.accelerator.device
    if is_peft_model(trainer.unwrapped) != (config.vllm_sync == "adapter"):
        has = "has adapters" if is_peft_model(trainer.unwrapped) else "has no adapters"
        raise ValueError(
            f"vllm_sync must be adapter for a model with adapters, and only for such a model, got "
            f"{config.vllm_sync} for one that {has}"
        )
    if config.vllm_sync == "nccl" and device.type != "cuda":
        raise ValueError(f"vllm_sync must be folder without a CUDA device, got nccl on {device}")
    kinds: dict[str, Any] = {
        "folder": FolderTransfer,
        "adapter": AdapterTransfer,
        "nccl": NCCLTransfer,
    }
    return kinds[config.vllm_sync](trainer)


class FolderTransfer:
    """Weights written to a folder, from which every server reloads its own.

    Attributes:
        kind: of the weights; the versions that servers are told begin with it.
        sends_head: whether the LM head is among the weights.
    """

    kind, sends_head = "model", True

    def __init__(self, trainer):
        self.trainer, config = trainer, trainer.config
        self.folder = Path(config.vllm_folder or Path(config.output_dir, "served")).resolve()
        self.written: Path | None = None

    def check(self, server: VLLMServer) -> None:
        """Checks that a server can read the folder.

        Raises:
            ServerError: it is on another machine, which need not see it: reloading from a folder
                that is not there would kill it.
        """
        host = urlsplit(server.url).hostname
        if self.trainer.config.vllm_folder is None and host not in LOCAL:
            raise ServerError(
                f"it is on another machine: set vllm_folder to a folder that {host} sees under the "
                "same path, or vllm_sync to nccl"
            )

    def send(self, source, tag: str) -> None:
        """Gives all living servers the weights. Every rank calls it.

        Raises:
            TrainingError: the weights could not be written.
            RolloutError: no server took them.
        """
        trainer, folder = self.trainer, self.folder / tag
        main, dtype = trainer.accelerator.is_main_process, self.dtype(source)

        def write():
            if main:
                shutil.rmtree(folder, ignore_errors=True)
            write_model(trainer, folder, dtype)

        failure = f"weights could not be written to {folder}"
        write_together(trainer.accelerator, folder, write, failure)

        def update(server):
            with server.paused():
                self.load(server, folder)
                server.adopt(tag)

        trainer.ranks.from_main(lambda: source.on_alive(update))
        if main and self.written not in (None, folder):
            shutil.rmtree(self.written, ignore_errors=True)
        self.written = folder

    def dtype(self, source) -> torch.dtype | None:
        """Returns the dtype to write: that of the servers, or the widest of theirs."""
        return self.trainer.ranks.from_main(lambda: served_dtype(source.alive))

    def load(self, server: VLLMServer, folder: Path) -> None:
        """Lets a server read the weights."""
        if not folder.is_dir():  # the engine of the server would die of it
            raise ServerError(f"{folder} is gone")
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        server.request("POST", "/collective_rpc", arguments)

    def close(self) -> None:
        """Deletes the last weights: servers hold them in memory."""
        if self.trainer.accelerator.is_main_process and self.written is not None:
            shutil.rmtree(self.written, ignore_errors=True)
            if self.trainer.config.vllm_folder is None:
                with contextlib.suppress(OSError):  # another run may share it
                    self.folder.rmdir()


class AdapterTransfer(FolderTransfer):
    """LoRA adapters in a folder, which every server loads in the place of the last ones."""

    kind, sends_head = "adapter", False

    def check(self, server: VLLMServer) -> None:
        """Checks that a server takes adapters of this rank, and still has the base model.

        Raises:
            ServerError: how to start it instead.
        """
        super().check(server)
        rank = self.peft_config.r
        lora = server.settings["lora_config"]
        if lora is None or lora["max_lora_rank"] < rank:
            raise ServerError(f"start it with --enable-lora --max-lora-rank {rank} or more")
        if not server.settings["environment"].get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            raise ServerError("start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment")
        version = server.request("GET", "/weight_info")["weight_version"]
        if version != "default" and not version.startswith(self.kind):
            raise ServerError(
                f"another run has changed its base model, to version {version}: restart it"
            )

    @property
    def peft_config(self) -> Any:
        """The settings of the adapter that is trained."""
        model = self.trainer.unwrapped
        return model.peft_config[model.active_adapter]

    def dtype(self, source) -> torch.dtype | None:
        """Returns None: adapters are small, and written as they are."""
        return None

    def load(self, server: VLLMServer, folder: Path) -> None:
        """Lets a server load the adapter, and answer with it from now on."""
        name = self.trainer.unwrapped.active_adapter
        path = folder if name == "default" else folder / name
        body = {"lora_name": ADAPTER, "lora_path": str(path), "load_inplace": True}
        server.request("POST", "/v1/load_lora_adapter", body)
        server.model = ADAPTER


class NCCLTransfer:
    """Weights broadcast from the main process to the workers of all servers, over NCCL.

    Not run here, where there is no GPU: written from vLLM 0.32's protocol, and tested against a
    stub of it. Parameters travel one by one under the names that transformers gives them. The
    group of trainer and workers is vLLM's own, so that vllm must be installed beside the trainer.
    """

    kind, sends_head = "model", True

    def __init__(self, trainer):
        self.trainer, self.group = trainer, None
        self.members: list[str] = []  # servers in the group

    def check(self, server: VLLMServer) -> None:
        """Checks that a server was started for it.

        Raises:
            ServerError: it was not, or the trainer lacks vllm.
        """
        transfer = server.settings.get("weight_transfer_config") or {}
        if transfer.get("backend") != "nccl":
            raise ServerError(
                'start it with --weight-transfer-config {"backend":"nccl"} for vllm_sync nccl'
            )
        try:
            import vllm.distributed.device_communicators.pynccl  # noqa: F401
        except ImportError as error:
            raise ServerError(f"vllm_sync nccl needs vllm beside the trainer ({error})") from error

    def send(self, source, tag: str) -> None:
        """Gives all living servers the weights. Every rank calls it.

        Raises:
            RolloutError: no server took them, or the broadcast failed.
        """
        trainer, main = self.trainer, self.trainer.accelerator.is_main_process
        model = trainer.unwrapped
        reshard(model)
        parameters = list(model.named_parameters())
        error: Exception | None = None

        def prepare():
            source.on_alive(lambda server: server.request("POST", "/pause?mode=wait"))
            urls = [server.url for server in source.alive]
            if urls != self.members or any(server.tag is None for server in source.alive):
                self._connect(source)
            source.on_alive(lambda server: server.request("POST", "/start_weight_update"))
            return served_dtype(source.alive)

        dtype = trainer.ranks.from_main(prepare)
        update = {
            "names": [name for name, _ in parameters],
            "dtype_names": [str(dtype).removeprefix("torch.")] * len(parameters),
            "shapes": [list(p.shape) for _, p in parameters],
        }
        receive = lambda server: server.request(  # noqa: E731
            "POST", "/update_weights", {"update_info": update}
        )
        with ThreadPoolExecutor(1) as pool:
            # A worker waits in the broadcast that belongs to its request.
            waiting = pool.submit(source.on_alive, receive) if main else None
            for _, parameter in parameters:
                tensor = full_tensor(parameter)  # of all ranks together, whatever happened
                if main and error is None:
                    try:
                        self._broadcast(tensor.to(dtype).contiguous())
                    except Exception as raised:
                        error = raised

            def finish():
                if error is not None:
                    raise RolloutError(f"weights could not be broadcast ({error})") from error
                waiting.result()

                def end(server):
                    server.request("POST", "/finish_weight_update", {"weight_version": tag})
                    server.adopt(tag)
                    server.request("POST", "/resume")

                source.on_alive(end)

            trainer.ranks.from_main(finish)

    def _connect(self, source):
        """Makes the group of this process, its rank 0, and the workers of all servers."""
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        self.close()
        sizes = source.on_alive(
            lambda server: server.request("GET", "/get_world_size")["world_size"]
        )
        servers = source.alive
        offsets = {s.url: 1 + sum(sizes[:i]) for i, s in enumerate(servers)}
        address, port = own_address(servers), free_port()
        common = {"master_address": address, "master_port": port, "world_size": 1 + sum(sizes)}

        def join(server):
            info = common | {"rank_offset": offsets[server.url], "packed": False}
            server.request("POST", "/init_weight_transfer_engine", {"init_info": info})

        with ThreadPoolExecutor(1) as pool:
            joining = pool.submit(source.on_alive, join)  # they wait for rank 0, it for them
            group = StatelessProcessGroup.create(address, port, 0, 1 + sum(sizes))
            self.group = PyNcclCommunicator(group, device=self.trainer.accelerator.device)
            joining.result()
        self.members = [server.url for server in source.alive]

    def _broadcast(self, tensor):
        stream = torch.cuda.current_stream() if tensor.is_cuda else None
        self.group.broadcast(tensor, src=0, stream=stream)
        if stream is not None:
            stream.synchronize()  # the tensor may be freed now

    def close(self) -> None:
        """Leaves the group."""
        destroy = getattr(self.group, "destroy", None)
        if destroy is not None:
            destroy()
        self.group, self.members = None, []


def served_dtype(servers: Sequence[VLLMServer]) -> torch.dtype:
    """Returns the widest dtype of the servers' weights."""
    names = [server.settings["model_config"]["dtype"] for server in servers]
    dtypes = [getattr(torch, name.removeprefix("torch.")) for name in names]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def own_address(servers: Sequence[VLLMServer]) -> str:
    """Returns the address of this machine, as servers on other machines see it."""
    urls = [urlsplit(server.url) for server in servers]
    parts = next((url for url in urls if url.hostname not in LOCAL), urls[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        return probe.getsockname()[0]


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
