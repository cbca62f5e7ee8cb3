"""Checks of the settings that say where rollouts come from."""

from urllib.parse import urlsplit


def check_source(config) -> None:
    """Checks that the settings of a source of rollouts fit each other.

    Raises:
        ValueError: servers are missing, superfluous or no addresses; they could not return what
            the settings of sampling ask for.
    """
    if config.rollout_source != "vllm":
        if config.vllm_servers:
            raise ValueError(
                f"vllm_servers requires rollout_source vllm, got {config.vllm_servers} with "
                f"{config.rollout_source}"
            )
        return
    if not config.vllm_servers:
        raise ValueError("rollout_source vllm requires vllm_servers, got []")
    for url in config.vllm_servers:
        if not is_address(url):
            raise ValueError(f"vllm_servers must be addresses as http://host:8000, got {url!r}")
    if len({url.rstrip("/") for url in config.vllm_servers}) < len(config.vllm_servers):
        raise ValueError(f"vllm_servers must differ, got {config.vllm_servers}")
    for name, default in (
        ("generation_kwargs", {}),
        ("stop_strings", []),
        ("repetition_penalty", 1.0),
    ):
        if getattr(config, name) != default:
            raise ValueError(
                f"{name} must be {default} with rollout_source vllm, which does not pass it on to "
                f"the servers, got {getattr(config, name)!r}"
            )
    if config.has_filters and not config.top_k:
        raise ValueError(
            "top_p and min_p require top_k with rollout_source vllm, because servers return "
            f"the probabilities of so many tokens, got top_p {config.top_p}, min_p {config.min_p}"
        )
    if config.temperature < 0.01:
        raise ValueError(
            "temperature must be at least 0.01 with rollout_source vllm, which samples lower "
            f"ones at 0.01, got {config.temperature}"
        )


def is_address(url: str) -> bool:
    """Returns whether a URL names a host, and perhaps a port, to send HTTP requests to."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or of brackets
        return False
