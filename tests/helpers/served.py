"""Runs whose rollouts come from stubs of a vLLM server, for the tests of such runs."""

from trainer_runs import trainer_of
from vllm_stub import Dropped, Refused


def served(folder, stubs, **options):
    """(trainer, records) of a run whose rollouts come from stubs."""
    options = {"rollout_source": "vllm", "vllm_servers": [s.url for s in stubs], **options}
    return trainer_of(folder, **{"vllm_start_timeout": 0.2, **options})


def refuse(code, message):
    def fault(body):
        raise Refused(code, {"error": {"message": message}})

    return fault


def drop(body):
    raise Dropped


def in_settings(stub, part, **values):
    stub.settings[part] = {**(stub.settings[part] or {}), **values}
