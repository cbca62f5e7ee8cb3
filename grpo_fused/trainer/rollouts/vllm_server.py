"""One vLLM server: its HTTP requests, its settings, and the completions that it answers with."""

import contextlib
import http.client
import itertools
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from grpo_fused.trainer.run.errors import shorten

BACKOFF = 1.0  # seconds before a request is repeated the first time; doubled each time
PROBE_SECONDS = 5.0  # for a server to say that it lives
REPEATED = (408, 429, 500, 502, 503, 504)  # HTTP codes of faults that may pass
MASKED = -9999.0  # vLLM's log-probability of a token that was left out: JSON has no infinity
TIES = 8  # log-probabilities to ask for besides top_k: tokens may share the last place
# Servers are neighbours: a proxy of the environment is for the world outside.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(Exception):
    """What went wrong with a server, without its name.

    Attributes:
        again: whether the same request may succeed a little later.
    """

    def __init__(self, message: str, again: bool = False):
        super().__init__(message)
        self.again = again


class Completion(NamedTuple):
    """A completion, the log-probability of each of its tokens, and `Rollout.support` or None."""

    token_ids: list[int]
    logprobs: list[float]
    support: tuple[np.ndarray, np.ndarray] | None


class Sampling(NamedTuple):
    """How completions are sampled: the settings of the config, and its end tokens."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    eos_ids: list[int]

    @property
    def num_logprobs(self) -> int:
        """Most probable tokens to ask for at each position: all that the filters can keep."""
        has_filters = self.top_k or self.top_p < 1 or self.min_p
        return self.top_k + TIES if has_filters else 0

    def body(self) -> dict[str, Any]:
        """The fields of a request; every one that a model's generation config could set.

        There is no seed: one would repeat the same draws for every prompt.
        """
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": 0,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,  # the end tokens of the trainer, no others
            "stop_token_ids": self.eos_ids,
            "logprobs": self.num_logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }


class VLLMServer:
    """Client of one server.

    Args:
        url: as http://host:8000.
        timeout: seconds to wait for the answer to a request.
        retries: how often a request is repeated after a fault that may pass.

    Attributes:
        lost: why the server is not used, or None.
        tag: the version of the weights that it was given, or None: others.
        model: the name of what it serves that is asked for completions.
        settings: vLLM's config and environment, from `read_settings`.
    """

    def __init__(self, url: str, timeout: float, retries: int):
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.lost: str | None = None
        self.tag: str | None = None
        self.model = ""
        self.settings: dict[str, Any] = {}

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        retries: int = 0,
    ) -> Any:
        """Sends a request and returns its answer: JSON, or text.

        Raises:
            ServerError: no connection, no answer in time, an HTTP error; or the server was lost.
        """
        for attempt in itertools.count():
            if self.lost is not None:  # as another thread has found out meanwhile
                raise ServerError(self.lost)
            try:
                return self._send(method, path, body, timeout or self.timeout)
            except ServerError as error:
                if not error.again or attempt >= retries:
                    raise
            time.sleep(BACKOFF * 2**attempt)

    def _send(self, method, path, body, timeout):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):  # as the server reads it
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        late = ServerError(f"{path} was not answered within {timeout:g} s")
        try:
            with OPENER.open(request, timeout=timeout) as answer:
                is_json = "json" in answer.headers.get("Content-Type", "")
                content = answer.read()
        except urllib.error.HTTPError as error:
            reason = f"{path} was refused with HTTP {error.code}: {_reason(error)}"
            raise ServerError(reason, again=error.code in REPEATED) from error
        except TimeoutError as error:
            raise late from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise late from error
            raise ServerError(f"the connection failed ({reason!r})", again=True) from error
        try:
            return json.loads(content) if is_json else content.decode()
        except ValueError as error:
            raise ServerError(f"{path} was answered with {shorten(content)}") from error

    def wait(self, seconds: float) -> None:
        """Waits for a server that is starting.

        Raises:
            ServerError: it was not ready after so many seconds.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                self.request("GET", "/health", timeout=PROBE_SECONDS)
                return
            except ServerError as error:
                if time.monotonic() > end:
                    raise ServerError(f"not ready after {seconds:g} s: {error}") from error
            time.sleep(min(1.0, seconds / 10))

    def lives(self) -> bool:
        """Returns whether a server that may be lost answers."""
        try:
            self._send("GET", "/health", None, PROBE_SECONDS)
        except ServerError:
            return False
        return True

    def read_settings(self) -> None:
        """Reads the settings of the server.

        Raises:
            ServerError: it does not tell them.
        """
        info = self.request("GET", "/server_info?config_format=json")
        self.settings = info["vllm_config"] | {"environment": info.get("vllm_env", {})}

    def models(self) -> dict[str, dict[str, Any]]:
        """Returns the models and adapters that the server has, by name."""
        return {model["id"]: model for model in self.request("GET", "/v1/models")["data"]}

    def complete(self, prompt_ids: list[int], n: int, sampling: Sampling) -> list[Completion]:
        """Samples n completions of a prompt.

        Raises:
            ServerError: the server failed, or its answer is not one to that question.
        """
        body = sampling.body() | {"model": self.model, "prompt": prompt_ids, "n": n}
        answer = self.request("POST", "/v1/completions", body, retries=self.retries)
        try:
            choices = answer["choices"]
            if len(choices) != n:
                raise ServerError(f"{n} completions were asked for, {len(choices)} came")
            return [_read_choice(choice, prompt_ids, sampling) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"completions lack what was asked for ({error!r})") from error

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Lets running requests end, and starts no other within the context."""
        self.request("POST", "/pause?mode=wait")
        try:
            yield
        except ServerError:  # what failed first is the reason
            with contextlib.suppress(ServerError):
                self.request("POST", "/resume")
            raise
        self.request("POST", "/resume")

    def adopt(self, tag: str) -> None:
        """Ends an update of the weights: forgets what the old ones computed, notes the new ones.

        Raises:
            ServerError: the cache of prefixes cannot be emptied.
        """
        for attempt in range(self.retries + 1):  # requests that were given up may still hold it
            if self.request("POST", "/reset_prefix_cache").get("success"):
                break
            if attempt == self.retries:
                raise ServerError("its cache of prefixes, made with old weights, stays full")
            time.sleep(BACKOFF * 2**attempt)
        self.request("POST", "/update_weight_version", {"new_version": tag})
        self.tag = tag

    def confirm(self, tag: str) -> None:
        """Checks that the server still has the weights that it was given.

        One that was restarted has those it starts with; another run may have sent its own.

        Raises:
            ServerError: it has others.
        """
        found = self.request("GET", "/weight_info", retries=self.retries)["weight_version"]
        if found != tag:
            self.tag = None
            raise ServerError(
                f"its weights are version {found!r} instead of {tag!r}: it was restarted, or "
                "another run uses it"
            )


def _read_choice(choice: dict[str, Any], prompt_ids: list[int], sampling: Sampling) -> Completion:
    """Checks one completion of an answer.

    Raises:
        ServerError: it belongs to another prompt, ends where it should not, or its
            log-probabilities are missing or those of other tokens.
        KeyError, TypeError, ValueError: a field is missing or has another type.
    """
    if choice["prompt_token_ids"] != prompt_ids:
        raise ServerError(
            f"a completion is of the prompt {shorten(choice['prompt_token_ids'])}, asked for was "
            f"{shorten(prompt_ids)}"
        )
    ids, limit = [int(token) for token in choice["token_ids"]], sampling.max_tokens
    if choice["finish_reason"] not in ("stop", "length") or not 1 <= len(ids) <= limit:
        raise ServerError(
            f"a completion ended with {choice['finish_reason']!r} after {len(ids)} of at most "
            f"{limit} tokens"
        )
    ended = ids[-1] in sampling.eos_ids
    if not ended and (choice["finish_reason"] == "stop" or len(ids) < limit):
        raise ServerError(
            f"a completion ended after {len(ids)} of at most {limit} tokens with {ids[-1]}, which "
            f"is none of the end tokens {sampling.eos_ids}"
        )
    found = choice["logprobs"]
    if found is None or None in found["token_logprobs"]:
        raise ServerError("log-probabilities of a completion are missing")
    names = [f"token_id:{token}" for token in ids]
    if found["tokens"] != names or len(found["token_logprobs"]) != len(ids):
        raise ServerError(
            f"log-probabilities are those of {shorten(found['tokens'])}, sampled was "
            f"{shorten(names)}"
        )
    logprobs = [float(value) for value in found["token_logprobs"]]
    if not all(MASKED < value < 1e-3 for value in logprobs):
        raise ServerError(f"log-probabilities must be finite and at most 0, got {min(logprobs)}")
    support = None
    if sampling.num_logprobs:
        support = _read_support(found["top_logprobs"], ids)
    return Completion(ids, logprobs, support)


def _read_support(
    top_logprobs: list[dict[str, float]], ids: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `Rollout.support`: the tokens of which the filters left some probability.

    Raises:
        ServerError: a token was sampled that they left out, or log-probabilities are not
            normalised over what they kept.
    """
    kept: list[list[int]] = []
    for token, found in zip(ids, top_logprobs, strict=True):
        tokens = {int(k.removeprefix("token_id:")): v for k, v in found.items() if v > MASKED}
        mass = sum(map(math.exp, tokens.values()))
        if token not in tokens or not 0.9 < mass < 1.01:
            raise ServerError(
                f"the tokens that top_k, top_p and min_p kept must have a probability of 1 and "
                f"the sampled {token} among them, got {mass:.3f} in {shorten(found)}"
            )
        kept.append(sorted(tokens))
    counts = np.array([len(tokens) for tokens in kept], np.int64)
    return counts, np.array([token for tokens in kept for token in tokens], np.int32)


def _reason(error: urllib.error.HTTPError) -> str:
    """The message in the body of an HTTP error, as vLLM and FastAPI word it."""
    try:
        text = error.read().decode(errors="replace")
    except OSError:
        return str(error.reason)
    try:
        body = json.loads(text)
        found = body.get("error", body.get("detail", text))
        text = found.get("message", text) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        pass
    return str(text)[:500] or str(error.reason)
