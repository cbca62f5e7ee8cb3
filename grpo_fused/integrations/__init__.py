"""Drop-ins for the trainers people already use; each module needs that trainer installed."""
