"""Rollouts from vLLM servers: shares prompts among them, and keeps their weights those of now.

The main process alone talks to the servers; every rank takes its share of what they return.
"""

import json
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from grpo_fused.trainer.rollouts.source import Samples
from grpo_fused.trainer.rollouts.vllm_server import Completion, Sampling, ServerError, VLLMServer
from grpo_fused.trainer.rollouts.vllm_weights import make_transfer
from grpo_fused.trainer.run.errors import RolloutError

R = TypeVar("R")
SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
IN_FLIGHT = 256  # requests that a server has at once


class VLLMSource:
    """The vLLM servers of a run, as its `RolloutSource`.

    A server that fails is named in a warning, and its prompts go to the others. Before the next
    rollout it is asked again, and takes part with new weights if it answers.

    Args:
        trainer: GRPOTrainer.

    Attributes:
        servers: all of them; on the main process they know which are lost.
        run: a name of this run, which no other run has given to its weights.
        version: optimizer steps that the policy had taken when the servers got its weights.
    """

    def __init__(self, trainer):
        config, self.trainer, self.ranks = trainer.config, trainer, trainer.ranks
        self.servers = [
            VLLMServer(url, config.vllm_timeout, config.vllm_retries) for url in config.vllm_servers
        ]
        self.sampling = Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p or 0.0,
            max_tokens=config.max_completion_length,
            eos_ids=trainer.sampler.eos_ids,
        )
        self.run, self.version = uuid.uuid4().hex[:8], 0
        self.transfer = make_transfer(trainer)

    @property
    def tag(self) -> str:
        """The version of the weights, as servers are told it."""
        return f"{self.transfer.kind}-{self.run}-{self.version}"

    def start(self) -> None:
        """Waits for the servers and checks their settings.

        Raises:
            ValueError: a server cannot be reached, serves another model, or was started with
                settings that do not fit the run.
        """

        def check(server):
            server.lost = server.tag = None
            server.wait(self.trainer.config.vllm_start_timeout)
            self._check(server)

        def check_all():
            for server, error in self._on_each(self.servers, check):
                if error is not None:
                    raise ValueError(f"vllm_servers: {server.url}: {error}")

        self.ranks.from_main(check_all)

    def _check(self, server):
        """Checks one server.

        Raises:
            ServerError: what is wrong with it, and how to start it instead.
        """
        config = self.trainer.config
        models = server.models()
        own = [name for name, model in models.items() if model.get("parent") is None]
        server.model = config.vllm_model or own[0]
        if server.model not in own:
            raise ServerError(f"it serves {', '.join(own)}, not vllm_model = {server.model!r}")
        try:
            server.read_settings()
        except ServerError as error:
            raise ServerError(
                f"it does not tell its settings ({error}); start it with VLLM_SERVER_DEV_MODE=1 in "
                "its environment, which weight syncs need too"
            ) from error
        settings = server.settings["model_config"]
        if settings["logprobs_mode"] != "processed_logprobs":
            raise ServerError(
                "its log-probabilities must be those of the distribution that it samples from: "
                f"start it with --logprobs-mode processed_logprobs, got {settings['logprobs_mode']}"
            )
        most, asked = settings["max_logprobs"], self.sampling.num_logprobs
        if -1 < most < asked:
            raise ServerError(
                f"it returns {most} log-probabilities of a token; for the support of top_k = "
                f"{config.top_k} start it with --max-logprobs {asked}"
            )
        longest = (config.max_prompt_length or 1) + config.max_completion_length
        if settings["max_model_len"] < longest:
            raise ServerError(
                f"its --max-model-len must be at least {longest}, the tokens of a prompt and its "
                f"completion, got {settings['max_model_len']}"
            )
        self.transfer.check(server)
        self._check_model(server)

    def _check_model(self, server):
        """Compares the policy with what a server serves, as far as this machine has its config.

        A vLLM server on a CPU keeps a packed copy of a tied head, which no sync reaches.

        Raises:
            ServerError: it is another model, or would keep its old head.
        """
        own = self.trainer.unwrapped.config.get_text_config()
        try:
            file = Path(server.settings["model_config"]["model"], "config.json")
            served = json.loads(file.read_text())
        except (OSError, ValueError):
            served = {}
        served = served.get("text_config", served)
        for name in SHAPE:
            mine, other = getattr(own, name, None), served.get(name)
            if None not in (mine, other) and mine != other:
                raise ServerError(f"it serves another model: {name} {other} instead of {mine}")
        on_cpu = server.settings["device_config"]["device"] == "cpu"
        packs_head = own.tie_word_embeddings and on_cpu and self.transfer.sends_head
        if packs_head and served.get("tie_word_embeddings") is not False:
            raise ServerError(
                "on a CPU vLLM keeps the old head of a model with tied embeddings: serve a copy "
                "whose config has tie_word_embeddings false and whose weights have lm_head.weight"
            )

    def sync(self, version: int) -> None:
        """Gives the policy's weights to all servers that have others, or were lost.

        Raises:
            RolloutError: no server took them.
            TrainingError: they could not be written.
        """
        self.version = version
        if self.ranks.from_main(self._need_sync):
            self.transfer.send(self, self.tag)

    def _need_sync(self):
        for server in self.servers:
            if server.lost is not None and server.lives():
                server.lost = server.tag = None
        self.check_any_left()
        return any(server.tag != self.tag for server in self.alive)

    def sample(self, prompt_ids: list[list[int]]) -> Samples:
        """Samples the completions of all ranks' prompts on the servers; returns this rank's.

        Raises:
            RolloutError: all servers are lost.
            ValueError: a prompt does not fit the context of a server.
        """
        prompts = self.ranks.gather_objects(prompt_ids)
        first = sum(map(len, prompts[: self.ranks.index]))
        mine = slice(first, first + len(prompt_ids))
        ids, logprobs, supports = self.ranks.from_main(lambda: self._sample(sum(prompts, [])))
        ids, logprobs = ids[mine], logprobs[mine]
        return Samples(
            ids,
            [self.trainer.sampler.is_truncated(row) for row in ids],
            logprobs,
            supports[mine] if self.sampling.num_logprobs else None,
            [[self.version] * len(row) for row in ids],
        )

    def _sample(self, prompts):
        """Returns (ids, logprobs, supports) of the prompts of all ranks."""
        places: dict[tuple[int, ...], list[int]] = {}  # one request per distinct prompt
        for place, ids in enumerate(prompts):
            places.setdefault(tuple(ids), []).append(place)
        found: list = [None] * len(prompts)
        for ids, completions in self._complete(places).items():
            for place, completion in zip(places[ids], completions, strict=True):
                found[place] = completion
        return tuple(list(values) for values in zip(*found, strict=True))

    def _complete(
        self, places: dict[tuple[int, ...], list[int]]
    ) -> dict[tuple[int, ...], list[Completion]]:
        """Samples as many completions of every prompt as it has places.

        A server counts only when it confirms, after all its answers, that its weights are still
        those of the last sync: what it said before it was lost is sampled again by the others.
        """
        finished: dict[tuple[int, ...], list[Completion]] = {}
        while len(finished) < len(places):
            waiting = {ids: len(at) for ids, at in places.items() if ids not in finished}
            finished |= self._share(waiting)
        return finished

    def _share(self, numbers: dict[tuple[int, ...], int]) -> dict[tuple[int, ...], list]:
        """Shares prompts among the living servers; returns the completions of some or all."""
        self.check_any_left()
        servers, prompts = self.alive, list(numbers)
        self._check_lengths(servers, max(map(len, prompts)))
        shares = {}
        for i, server in enumerate(servers):
            shares[server.url] = {ids: numbers[ids] for ids in prompts[i :: len(servers)]}
        found: dict[tuple[int, ...], list] = {}
        for answers in self.on_alive(lambda server: self._ask(server, shares[server.url])):
            found |= answers
        return found

    def _ask(self, server, numbers):
        """Returns the completions that a server samples, by prompt; `numbers` says how many.

        Raises:
            ServerError: a request failed, which ends the others.
        """

        def ask(ids):
            try:
                return server.complete(list(ids), numbers[ids], self.sampling)
            except ServerError as error:
                server.lost = server.lost or str(error)
                raise

        with ThreadPoolExecutor(min(IN_FLIGHT, max(1, len(numbers)))) as pool:
            found = dict(zip(numbers, pool.map(ask, numbers), strict=True))
        server.confirm(self.tag)
        return found

    def _check_lengths(self, servers, longest):
        room = min(server.settings["model_config"]["max_model_len"] for server in servers)
        if longest + self.sampling.max_tokens > room:
            raise ValueError(
                f"a prompt of {longest} tokens leaves {max(room - longest, 0)} of the servers' "
                f"--max-model-len of {room} for max_completion_length = {self.sampling.max_tokens};"
                " set max_prompt_length to truncate it"
            )

    @property
    def alive(self) -> list[VLLMServer]:
        """The servers that are not lost."""
        return [server for server in self.servers if server.lost is None]

    def on_alive(self, action: Callable[[VLLMServer], R]) -> list[R]:
        """Runs an action on all servers at once; those on which it fails are lost.

        Returns:
            What it returned on the others.

        Raises:
            RolloutError: it failed on all.
        """
        results = []
        for server, outcome in self._on_each(self.alive, action):
            if isinstance(outcome, ServerError):
                server.lost = str(outcome)
                if self.alive:
                    warnings.warn(
                        f"vLLM server {server.url} is lost: {outcome}; the others take its prompts",
                        stacklevel=2,
                    )
            else:
                results.append(outcome)
        self.check_any_left()
        return results

    @staticmethod
    def _on_each(servers, action):
        """Returns [(server, what the action returned, or its ServerError)]."""

        def run(server):
            try:
                return action(server)
            except (LookupError, TypeError, AttributeError) as error:
                failure = ServerError(f"an answer is not as in vLLM's protocol ({error!r})")
            except ServerError as error:
                failure = error
            server.lost = server.lost or str(failure)
            return failure

        with ThreadPoolExecutor(max(1, len(servers))) as pool:
            return list(zip(servers, pool.map(run, servers), strict=True))

    def check_any_left(self) -> None:
        """Checks that a server is left.

        Raises:
            RolloutError: with what happened to each.
        """
        if not self.alive:
            reasons = "; ".join(f"{server.url}: {server.lost}" for server in self.servers)
            raise RolloutError(f"no vLLM server is left ({reasons})")

    def close(self) -> None:
        """Deletes the weights that were written for the servers."""
        self.transfer.close()
