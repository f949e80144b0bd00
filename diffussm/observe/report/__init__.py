"""`diffussm report`: one HTML page that tells a run's whole story, from what lies in its store."""
