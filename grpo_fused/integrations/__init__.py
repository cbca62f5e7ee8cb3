"""Drop-in replacements for transformers, TRL and verl; each module imports its framework itself."""
