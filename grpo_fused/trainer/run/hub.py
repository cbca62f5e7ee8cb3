"""Uploads `model/` of a finished run to the Hugging Face Hub."""

import warnings
from pathlib import Path

import huggingface_hub

from grpo_fused.trainer.run.errors import TrainingError


def hub_name(config) -> str:
    """Returns the repository to upload to: hub_model_id, or the name of output_dir."""
    return config.hub_model_id or Path(config.output_dir).absolute().name


def warn_without_token(config) -> None:
    """Warns before training of what will fail after it: an upload without a login."""
    if config.push_to_hub and huggingface_hub.get_token() is None:
        warnings.warn(
            "push_to_hub: there is no token, so that the upload after training will fail; log in "
            "with `hf auth login`, or set HF_TOKEN",
            stacklevel=2,
        )


def push_to_hub(folder: Path, config) -> str:
    """Creates the repository if it does not exist and uploads a folder; returns its address.

    Raises:
        TrainingError: the upload failed; it names the folder, which stays, and how to upload it.
    """
    name, api = hub_name(config), huggingface_hub.HfApi()
    try:
        url = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        name = url.repo_id  # with the user's name
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Trained with grpo-fused"
        )
    except Exception as error:  # of the network, of the server, of the name
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(
            f"push_to_hub: {name} could not be uploaded ({reason[0]}); nothing is lost: the model "
            f"is in {folder}, and `hf upload {name} {folder}` uploads it"
        ) from error
    return str(url)
