"""Drop-ins for trainers that people already use; each imports its framework when it is imported."""
