"""What the rooms hand to each other: config, stage artifacts, table schemas, tracking."""
