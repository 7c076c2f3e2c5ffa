"""What is published of an average: the settings, and which rank writes which part of which file."""
