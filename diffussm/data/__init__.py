"""From images to batches of latents: sources, autoencoder, shards with their passport, streaming and the cursor."""
