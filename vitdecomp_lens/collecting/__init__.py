"""What collecting is made of: images under identifiers, reading ahead, and statistics that need no store."""
