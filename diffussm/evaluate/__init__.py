"""How far generated pictures are from real ones: features, their moments, distances and the stated floor."""
