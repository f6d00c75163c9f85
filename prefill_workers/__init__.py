"""The prefill role: run prompts, emit the first token, give the KV away."""
