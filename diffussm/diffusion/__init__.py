"""The forward process and its loss, guidance, and the samplers that run the process in reverse."""
