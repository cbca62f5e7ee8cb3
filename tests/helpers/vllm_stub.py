"""A stand-in for a vLLM server: what the trainer uses of its HTTP protocol, with real sampling.

A tiny model of transformers samples, so that log-probabilities are right. Draws depend on the
prompt and on the version of the weights alone, so that a resumed run gets the same ones.
"""

import contextlib
import json
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# `from_pretrained` replaces PreTrainedModel.tie_weights for a while; of two threads, for good.
LOADING = threading.Lock()
MODEL_CONFIG = {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs"}
MODEL_CONFIG |= {"max_logprobs": 20, "max_model_len": 64}


def load(folder):
    """The model in a folder; several threads take turns."""
    with LOADING:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Stub:
    """A server of the model in a folder.

    Attributes:
        url: where it listens.
        log: (method, path without its query, body) of every request, in order.
        faults: {path: function of the body}, called before the path is served; it may raise
            `Refused` or `Dropped`, or wait.
        change: function of the choices of an answer, which changes them.
        settings: the "vllm_config" of /server_info; None: the server has no such path.
        broadcast: what an NCCL broadcast delivers: a queue of tensors.
    """

    def __init__(self, folder, *, name="policy"):
        self.folder, self.name = str(folder), name
        self.model = load(folder)
        self.fresh, self.adapters, self.cached = None, {}, None
        self.version, self.paused, self.lock = "default", False, threading.Lock()
        self.log, self.faults, self.change, self.broadcast = [], {}, lambda choices: None, None
        self.settings = {"model_config": {"model": self.folder, **MODEL_CONFIG}}
        self.settings |= {"device_config": {"device": "cpu"}, "lora_config": None}
        self.settings |= {"weight_transfer_config": None}
        self.environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": True}
        self.start()

    def start(self, port=0):
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                stub.answer(self, "GET")

            def do_POST(self):
                stub.answer(self, "POST")

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        """Nobody listens any more."""
        self.http.shutdown()
        self.http.server_close()

    def forget(self):
        """Has the weights of the folder again, as after a restart that nobody saw."""
        self.model = load(self.folder)
        self.version, self.adapters, self.cached, self.paused = "default", {}, None, False

    def restart(self):
        """Starts again at the same address."""
        self.forget()
        self.start(int(self.url.rpartition(":")[2]))

    def paths(self):
        return [path for _, path, _ in self.log]

    def prompts(self):
        return [body["prompt"] for _, path, body in self.log if path == "/v1/completions"]

    def answer(self, handler, method):
        path = handler.path.partition("?")[0]
        length = int(handler.headers.get("Content-Length") or 0)
        body = json.loads(handler.rfile.read(length)) if length else {}
        with self.lock:
            self.log.append((method, path, body))
        try:
            if path in self.faults:
                self.faults[path](body)
            action = getattr(self, "_" + path.strip("/").replace("/", "_"), None)
            if action is None:
                raise Refused(404, {"detail": "Not Found"})
            with self.lock:
                code, content = 200, action(body)
        except Refused as error:
            code, content = error.args
        except Dropped:
            with contextlib.suppress(OSError):
                handler.connection.close()
            return
        is_text = isinstance(content, str)
        data = (content if is_text else json.dumps(content)).encode()
        with contextlib.suppress(OSError):  # the client did not wait
            handler.send_response(code)
            handler.send_header("Content-Type", "text/plain" if is_text else "application/json")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)

    def _health(self, body):
        return ""

    def _v1_models(self, body):
        own = {"id": self.name, "root": self.folder, "parent": None}
        return {"data": [own, *({"id": name, "parent": self.name} for name in self.adapters)]}

    def _server_info(self, body):
        if self.settings is None:
            raise Refused(404, {"detail": "Not Found"})
        return {"vllm_config": self.settings, "vllm_env": self.environment}

    def _get_world_size(self, body):
        return {"world_size": 1}

    def _pause(self, body):
        self.paused = True
        return {"status": "paused"}

    def _resume(self, body):
        self.paused = False
        return {"status": "resumed"}

    def _reset_prefix_cache(self, body):
        self.cached = None
        return {"success": True}

    def _update_weight_version(self, body):
        self.version = body["new_version"]
        return {"success": True, "new_version": self.version}

    def _weight_info(self, body):
        return {"weight_version": self.version}

    def _keep_cache(self):
        """What the old weights computed stays in use until the cache is emptied."""
        if not self.paused:
            raise Refused(500, {"error": {"message": "weights change while requests run"}})
        self.cached = {"": self.model, **self.adapters} if self.cached is None else self.cached

    def _collective_rpc(self, body):
        assert body["method"] == "reload_weights"
        weights = load_file(body["kwargs"]["weights_path"] + "/model.safetensors")
        self._keep_cache()
        self.model = self._copy(weights)
        return {"results": [None]}

    def _copy(self, weights):
        model = load(self.folder)
        model.load_state_dict(weights)
        return model

    def _v1_load_lora_adapter(self, body):
        self._keep_cache()
        base = load(self.folder)
        self.adapters[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        return f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def _init_weight_transfer_engine(self, body):
        self.joined = body["init_info"]
        return {"message": "Weight transfer initialized"}

    def _start_weight_update(self, body):
        self.fresh = {}
        return {"message": "Weight update started"}

    def _update_weights(self, body):
        update = body["update_info"]
        for name, dtype, shape in zip(*update.values(), strict=True):
            tensor = self.broadcast.get(timeout=10)
            assert list(tensor.shape) == shape and str(tensor.dtype) == f"torch.{dtype}"
            self.fresh[name] = tensor
        return {"message": "Weights updated"}

    def _finish_weight_update(self, body):
        self._keep_cache()
        self.model, self.version = self._copy(self.fresh), body["weight_version"]
        return {"message": "Weight update finished"}

    def _v1_completions(self, body):
        if self.paused:
            raise Refused(503, {"error": {"message": "paused"}})
        models = {"": self.model, **self.adapters} if self.cached is None else self.cached
        name = "" if body["model"] == self.name else body["model"]
        if name not in models:
            message = f"The model `{body['model']}` does not exist."
            raise Refused(404, {"error": {"message": message}})
        choices = sample(models[name], body, self.version.rpartition("-")[2])
        self.change(choices)
        return {"choices": choices}


class Refused(Exception):
    """An HTTP error: (code, body)."""


class Dropped(Exception):
    """The connection ends without an answer."""


@torch.no_grad()
def sample(model, body, version):
    """The choices of a request, as vLLM 0.32 words them."""
    draws = torch.Generator().manual_seed(zlib.crc32(f"{body['prompt']} {version}".encode()))
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(body["temperature"]))])
    if body["top_k"]:
        processors.append(TopKLogitsWarper(body["top_k"]))
    if body["top_p"] < 1:
        processors.append(TopPLogitsWarper(body["top_p"]))
    if body["min_p"]:
        processors.append(MinPLogitsWarper(body["min_p"]))
    ids = torch.tensor([body["prompt"]] * body["n"])
    steps = []
    for _ in range(body["max_tokens"]):
        logps = processors(ids, model(input_ids=ids).logits[:, -1]).log_softmax(-1)
        drawn = torch.multinomial(logps.exp(), 1, generator=draws)
        ids = torch.cat([ids, drawn], 1)
        steps.append(logps.clamp(min=-9999.0))
    choices = []
    for row in range(body["n"]):
        tokens = ids[row, len(body["prompt"]) :].tolist()
        ends = [i for i, token in enumerate(tokens) if token in body["stop_token_ids"]]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        found = [step[row] for step in steps[: len(tokens)]]
        top = []
        for token, logps in zip(tokens, found, strict=True):
            most = logps.topk(min(body["logprobs"], len(logps))).indices.tolist()
            top.append({f"token_id:{i}": logps[i].item() for i in [token, *most]})
        logprobs = {"tokens": [f"token_id:{token}" for token in tokens], "top_logprobs": top}
        values = [logps[token].item() for token, logps in zip(tokens, found, strict=True)]
        logprobs["token_logprobs"] = values
        choice = {"index": row, "finish_reason": "stop" if ends else "length"}
        choice |= {"prompt_token_ids": body["prompt"], "token_ids": tokens, "logprobs": logprobs}
        choices.append(choice)
    return choices
