"""The decode role: take KV in, decode in the continuous batch; prefill locally when told to."""
