"""Whether a machine, an installation and a job's places are what the job needs: one check, one line."""
