"""The training loop and what it stands on: engine, step, EMA, optimiser, guard."""
