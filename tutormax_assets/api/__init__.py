"""Python entry points over the job."""
