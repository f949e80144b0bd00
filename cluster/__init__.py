"""Everything that runs inside a job: Ray starts, watches and restarts the workers."""
