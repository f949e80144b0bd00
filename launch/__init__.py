"""Everything that runs on a laptop or a login node: the command line, plans and job scripts. No torch, no ray."""
