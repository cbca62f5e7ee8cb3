"""The LM head applied to chunks of tokens, so that the logits never exist as a whole."""
