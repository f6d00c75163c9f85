"""A load generator for servers that speak the OpenAI API: open-loop arrivals, streamed answers, vLLM's metrics."""
