"""Weights kept in 8 bits: int8 on CPUs and GPUs, fp8 on GPUs that compute in it.

methods.py says what there is, without torch; int8.py and fp8.py are the layers; int8_triton.py multiplies a few rows on
a GPU. engine.linears decides which layers they replace: every projection of the decoder layers. Norms and embeddings
are kept as they are, and so is the output layer: where it is tied to the embeddings a second copy would cost memory,
and its rounding goes straight into the logits.
"""
