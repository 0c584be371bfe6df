"""Raw logs to corpus/, on Spark."""
