"""MicroDiT in JAX: text-to-image diffusion transformers on a micro-budget."""
