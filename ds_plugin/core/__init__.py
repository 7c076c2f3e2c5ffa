"""What the methods share. Nothing here knows a method or a framework."""
