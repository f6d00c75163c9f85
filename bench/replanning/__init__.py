"""What replanning is worth when traffic changes at once, and what it costs the requests that are there."""
