"""Runs and data in buckets: gs:// and s3:// paths, and the local copies of what lies there."""
