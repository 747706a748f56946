"""The job on servers as people run them: older ones, behind a pooler, with other encodings."""
